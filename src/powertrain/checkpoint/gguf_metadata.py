"""A model's config in GGUF's words, the reverse of `gguf_config.py`, and its weights in GGUF's names and row order."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from powertrain.checkpoint.gguf import GLOBAL_NAMES, LAYER_NAMES
from powertrain.model.families import ModelConfig
from powertrain.model.layers import rope_frequencies
from powertrain.types import PowertrainError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Family -> what llama.cpp calls it."""

QUANTIZATION_VERSION = 2
ROPE_FACTORS = "rope_freqs.weight"

_GLOBAL = {name: gguf_name for gguf_name, name in GLOBAL_NAMES.items()}
_LAYER = {name: gguf_name for gguf_name, name in LAYER_NAMES.items()}


def metadata_from_config(config: ModelConfig, name: str) -> dict[str, Any]:
    """The `general.*` and architecture keys. Raises `PowertrainError` for what a GGUF file has no word for."""
    windows = set(config.windows)
    if config.has_mlp_bias or len(windows) > 1 or (windows != {None} and config.family != "mistral"):
        what = "mlp_bias" if config.has_mlp_bias else "sliding windows in some layers"
        raise PowertrainError(f"config.json: {what} of a {config.family} model cannot be said in a GGUF file")
    architecture = ARCHITECTURES[config.family]
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    [window] = windows
    if window is not None:
        keys["attention.sliding_window"] = window
    general = {"architecture": architecture, "name": name, "quantization_version": QUANTIZATION_VERSION}
    return {f"general.{key}": value for key, value in general.items()} | {
        f"{architecture}.{key}": value for key, value in keys.items()
    }


def rope_factors(config: ModelConfig) -> torch.Tensor | None:
    """What each rotary frequency is divided by, float32 [head_dim / 2], for scalings that are no one number."""
    if config.rope_scaling is None or config.rope_scaling.kind == "linear":
        return None
    if config.rope_scaling.factors:
        return torch.tensor(config.rope_scaling.factors, dtype=torch.float32)
    dims = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    return 1.0 / config.rope_theta ** (dims / config.head_dim) / rope_frequencies(config)


def gguf_name(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    stem, kind = name.rsplit(".", 1)
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    return f"blk.{layer[1]}.{_LAYER[layer[2]]}.{kind}" if layer else f"{_GLOBAL[stem]}.{kind}"


def has_interleaved_rows(config: ModelConfig, name: str) -> bool:
    """Whether llama.cpp wants this tensor's rows in its own order: queries and keys of its `llama` architecture."""
    return ARCHITECTURES[config.family] == "llama" and re.search(r"\.[qk]_proj\.\w+$", name) is not None


def interleave_rows(rows: npt.NDArray[np.uint8], head_dim: int) -> npt.NDArray[np.uint8]:
    """Rows of each head from its two halves to pairs: rotation there is over neighbours."""
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
