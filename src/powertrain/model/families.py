"""A family is a mapping from its Hugging Face config to the one decoder's settings. Tensor names are shared by all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from powertrain.types import ModelFileError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    `llama3` follows the Llama 3.1 release: low frequencies are divided by `factor`, high ones kept, those between
    blended. `linear` divides all by `factor`. `factors` are divisors given one by one (GGUF's `rope_freqs`).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything the decoder needs to know. `windows` holds the attention window of each layer, None for full."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    windows: tuple[int | None, ...] = ()
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    ties_embeddings: bool = False
    dtype: str = "float32"

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of keys and values one token adds over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_size

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape [out, in] of each linear layer of one block, by its Hugging Face name."""
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (heads, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def num_linear_parameters(self) -> int:
        """Weights multiplied per token: all linear layers and the head."""
        block = sum(rows * cols for rows, cols in self.linear_shapes().values())
        return self.num_layers * block + self.vocab_size * self.hidden_size

    def flops_per_token(self, context: int) -> int:
        """Multiply-adds counted twice, for one token that attends to `context` positions."""
        attended = sum(context if window is None else min(context, window) for window in self.windows)
        return 2 * self.num_linear_parameters() + 4 * self.num_heads * self.head_dim * attended


def _rope_scaling(config: Mapping[str, Any], rope: Mapping[str, Any]) -> RopeScaling | None:
    if factors := config.get("rope_factors"):
        return RopeScaling(kind="factors", factors=tuple(float(f) for f in factors))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position=int(rope["original_max_position_embeddings"]),
        )
    raise ModelFileError(f"config.json: rope type {kind!r} is not supported; supported: default, linear, llama3")


def _base(config: Mapping[str, Any], **own: Any) -> ModelConfig:
    """What all families share. Transformers 5 keeps rope settings in `rope_parameters`, older ones apart."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta") or rope.get("rope_theta") or 10000.0
    num_heads = int(config["num_attention_heads"])
    num_layers = int(config["num_hidden_layers"])
    fields: dict[str, Any] = {
        "family": config["model_type"],
        "vocab_size": int(config["vocab_size"]),
        "hidden_size": int(config["hidden_size"]),
        "intermediate_size": int(config["intermediate_size"]),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or num_heads),
        "head_dim": int(config.get("head_dim") or int(config["hidden_size"]) // num_heads),
        "max_position": int(config["max_position_embeddings"]),
        "rms_norm_eps": float(config["rms_norm_eps"]),
        "rope_theta": float(theta),
        "rope_scaling": _rope_scaling(config, rope),
        "windows": (None,) * num_layers,
        "ties_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    }
    return ModelConfig(**(fields | own))


def _llama(config: Mapping[str, Any]) -> ModelConfig:
    bias = bool(config.get("attention_bias", False))
    mlp_bias = bool(config.get("mlp_bias", False))
    return _base(config, has_qkv_bias=bias, has_output_bias=bias, has_mlp_bias=mlp_bias)


def _mistral(config: Mapping[str, Any]) -> ModelConfig:
    return _base(config, windows=(config.get("sliding_window"),) * int(config["num_hidden_layers"]))


def _layer_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Qwen: the layers named sliding, or in older configs those from `max_window_layers` on, see a window."""
    num_layers, window = int(config["num_hidden_layers"]), config.get("sliding_window")
    if not config.get("use_sliding_window", False) or window is None:
        return (None,) * num_layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = int(config.get("max_window_layers", num_layers))
        kinds = ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:num_layers])


def _qwen2(config: Mapping[str, Any]) -> ModelConfig:
    return _base(config, has_qkv_bias=True, windows=_layer_windows(config))


def _qwen3(config: Mapping[str, Any]) -> ModelConfig:
    bias = bool(config.get("attention_bias", False))
    return _base(config, has_qk_norm=True, has_qkv_bias=bias, has_output_bias=bias, windows=_layer_windows(config))


FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}

_MAX_SIZES = {"vocab_size": 2**21, "hidden_size": 2**17, "intermediate_size": 2**19, "num_layers": 1024}


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """Translate a Hugging Face config. Raises `ModelFileError` naming the key that is absent, unknown or absurd."""
    family = config.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelFileError(f"config.json: model_type {family!r} is not supported; supported families: {known}")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelFileError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; supported: silu")
    try:
        result = FAMILIES[family](config)
    except KeyError as missing:
        raise ModelFileError(f"config.json: key {missing} is missing") from None
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"config.json: {error}") from None
    _check(result)
    return result


def _check(config: ModelConfig) -> None:
    for name, largest in _MAX_SIZES.items():
        value = getattr(config, name)
        if not 1 <= value <= largest:
            raise ModelFileError(f"config.json: {name} is {value}; it must be in 1..{largest}")
    if config.num_heads < 1 or config.num_kv_heads < 1 or config.num_heads % config.num_kv_heads:
        raise ModelFileError(
            f"config.json: num_attention_heads {config.num_heads} is no multiple of "
            f"num_key_value_heads {config.num_kv_heads}"
        )
    if not 1 <= config.head_dim <= 1024 or config.head_dim % 2:
        raise ModelFileError(f"config.json: head_dim {config.head_dim} must be even and at most 1024")
    if not math.isfinite(config.rope_theta) or config.rope_theta <= 0 or config.max_position < 1:
        raise ModelFileError("config.json: rope_theta and max_position_embeddings must be positive")
    if any(window is not None and (not isinstance(window, int) or window < 1) for window in config.windows):
        raise ModelFileError("config.json: sliding_window must be a positive integer or null")
