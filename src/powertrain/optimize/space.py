"""What `optimize` tries (weight formats, engine settings), what it measures of each, and the limits they must meet."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from powertrain.types import PowertrainError

# The CPU and CUDA int4 products take these; 64 first: the best fidelity for its bytes on the models here.
_INT4_GROUPS = (64, 32, 128)
# Below this share of all multiplied weights an 8-bit head saves less than run-to-run noise.
_MIN_HEAD_SHARE = 0.03

_MEMORY_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store the weights. `recipe` is what `compress` takes, None for the model as it is."""

    name: str
    recipe: Mapping[str, Any] | None = None

    @property
    def folder(self) -> str:
        """A file name for it."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.name)


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run the engine: names and values of the flags of `powertrain serve`, with underscores."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Distance from the reference, on the checkpoint read back from disk. KL in nats per token, mean over tokens.

    `kl_small_batch` is the same on the products for few rows, which decoding takes and scoring does not. The
    reference itself has 0, 1 and 1.
    """

    kl: float
    kl_low: float
    kl_high: float
    kl_small_batch: float
    top1_agreement: float
    ppl_ratio: float
    bits_per_weight: float | None = None

    @property
    def worst_kl(self) -> float:
        """What `--max-kl` is held against: neither path may break it."""
        return max(self.kl, self.kl_small_batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Measured with the real engine at the asked batch. Times in ms, mean over the requests; memory of its process."""

    ttft_ms: float
    tpot_ms: float
    output_tokens_per_s: float
    memory_bytes: int
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A candidate with what is known of it. `speed` None: not measured, `failure` says why if it is not fidelity."""

    format: Format
    setting: Setting
    fidelity: Fidelity | None
    speed: Speed | None = None
    failure: str | None = None

    @property
    def name(self) -> str:
        return f"{self.format.name} · {self.setting.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a winner must meet; None is no limit. Times in ms, KL in nats per token, memory in bytes."""

    tpot_ms: float | None = None
    ttft_ms: float | None = None
    max_kl: float | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None and not 0 <= value < float("inf"):
                raise PowertrainError(f"--{limit.name.replace('_', '-')} must be zero or more, got {value}")


def parse_memory(value: int | str | None) -> int | None:
    """Bytes of `600MB`, `1.5GiB` or a plain number. Raises `PowertrainError` for anything else."""
    if value is None or isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    unit = match and _MEMORY_UNITS.get(match[2].upper())
    if not match or not unit:
        raise PowertrainError(f"--max-memory must be like 600MB or 1.5GiB, got {value!r}")
    return round(float(match[1]) * unit)


def formats(config: Mapping[str, Any]) -> list[Format]:
    """The weight formats worth trying for a model with this config (Hugging Face keys); the model as it is comes first.

    Only formats that the engine multiplies as they are stored: one that is dequantized at load would be no faster.
    A model that is quantized already is only tried as it is.
    """
    as_is = Format("none")
    if config.get("quantization_config"):
        return [as_is]
    schemes: list[tuple[str, dict[str, Any]]] = [("W8A16 channel", {"scheme": "W8A16", "group_size": "channel"})]
    if group := int4_group(config):
        schemes.append((f"W4A16 g{group}", {"scheme": "W4A16", "group_size": group}))
        schemes.append((f"W4A16_ASYM g{group}", {"scheme": "W4A16_ASYM", "group_size": group}))
    made = [as_is]
    helps_head = _head_share(config) >= _MIN_HEAD_SHARE
    for name, scheme in schemes:
        body = {"match": "Linear", "method": "rtn", **scheme}
        head = {"match": "lm_head", "method": "rtn", "scheme": "W8A16", "group_size": "channel"}
        # Beside a 4-bit body an 8-bit head costs no fidelity that can be seen: there only the faster one is tried.
        if not helps_head or scheme["scheme"] == "W8A16":
            made.append(Format(name, {"name": name, "steps": [body]}))
        if helps_head:
            with_head = f"{name}, head W8A16"
            made.append(Format(with_head, {"name": with_head, "steps": [body, head]}))
    return made


def int4_group(config: Mapping[str, Any]) -> int | None:
    """The group size for 4 bits: the first preferred one that divides every row of the decoder, None if none does."""
    rows = {int(config["hidden_size"]), int(config["intermediate_size"]), _attention_width(config)}
    return next((size for size in _INT4_GROUPS if all(row % size == 0 for row in rows)), None)


def settings(batch: int, threads: int | None = None, kv_cache_memory_bytes: int | None = None) -> list[Setting]:
    """The engine settings worth trying at `batch` concurrent requests: one alternative each, to stay within minutes.

    One request: drafts from its own text cost little and may save steps. Several: a smaller step budget lets running
    requests go on while new prompts are computed.
    """
    common = {"threads": threads, "kv_cache_memory_bytes": kv_cache_memory_bytes}
    given = {name: value for name, value in common.items() if value is not None}
    if batch == 1:
        draft = {"method": "ngram", "num_speculative_tokens": 4}
        return [Setting("default", given), Setting("n-gram drafts", {**given, "speculative_config": draft})]
    return [Setting("default", given), Setting("256-token steps", {**given, "max_num_batched_tokens": 256})]


def serve_command(model: str, options: Mapping[str, Any]) -> str:
    """The shell line that serves `model` with these engine options."""
    words = ["powertrain", "serve", model]
    for name, value in options.items():
        text = json.dumps(dict(value)) if isinstance(value, Mapping) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


def _attention_width(config: Mapping[str, Any]) -> int:
    num_heads = int(config["num_attention_heads"])
    return num_heads * int(config.get("head_dim") or int(config["hidden_size"]) // num_heads)


def _head_share(config: Mapping[str, Any]) -> float:
    from powertrain.model.families import model_config

    parsed = model_config(config)
    return parsed.vocab_size * parsed.hidden_size / parsed.num_linear_parameters()
