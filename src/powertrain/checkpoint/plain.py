"""Every weight of a model as floats, whatever the checkpoint stores it as, one in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from powertrain.checkpoint.load import EMBEDDING
from powertrain.checkpoint.quantization_config import HEAD
from powertrain.checkpoint.quantized import QuantizedMatrix, load_quantized
from powertrain.checkpoint.source import Checkpoint, load_checked
from powertrain.model.families import ModelConfig
from powertrain.types import ModelFileError

FINAL_NORM = "model.norm.weight"


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight a model of this config has, embedding first, head (where untied) last."""
    table, hidden = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": table}
    for index in range(config.num_layers):
        block = f"model.layers.{index}"
        shapes |= {f"{block}.{norm}.weight": hidden for norm in ("input_layernorm", "post_attention_layernorm")}
        if config.has_qk_norm:
            shapes |= {f"{block}.self_attn.{norm}.weight": (config.head_dim,) for norm in ("q_norm", "k_norm")}
        for layer, shape in config.linear_shapes().items():
            shapes[f"{block}.{layer}.weight"] = shape
            if _has_bias(config, layer):
                shapes[f"{block}.{layer}.bias"] = (shape[0],)
    shapes[FINAL_NORM] = hidden
    return shapes if config.ties_embeddings else shapes | {f"{HEAD}.weight": table}


def _has_bias(config: ModelConfig, layer: str) -> bool:
    if layer.startswith("mlp."):
        return config.has_mlp_bias
    return config.has_output_bias if layer == "self_attn.o_proj" else config.has_qkv_bias


def read_weight(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> torch.Tensor | QuantizedMatrix:
    """A weight as it is stored: floats of 16 bits or more, or what a quantized matrix consists of.

    Raises `ModelFileError` naming the tensor that is absent or does not fit.
    """
    layer = name.removesuffix(".weight")
    if len(shape) == 2 and name != f"{EMBEDDING}.weight":
        matrix = load_quantized(checkpoint, layer, (shape[0], shape[1]))
        if matrix is not None:
            return matrix
    if name not in checkpoint.names():
        raise ModelFileError(f"{checkpoint.path}: tensor {name} is missing")
    return load_checked(checkpoint, name, shape)


def plain_weights(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, weight in `dtype`, whether its inputs were rounded too) of every weight.

    Raises `ModelFileError` for one that `dtype` cannot hold.
    """
    for name, shape in weight_shapes(config).items():
        stored = read_weight(checkpoint, name, shape)
        rounds_input = isinstance(stored, QuantizedMatrix) and stored.rounds_input
        weight = stored if isinstance(stored, torch.Tensor) else stored.weight.dequantize()
        weight = weight.to(dtype)
        if not bool(torch.isfinite(weight).all()):
            raise ModelFileError(f"{checkpoint.path}: {name} holds NaN, infinity or a number beyond {dtype}")
        yield name, weight, rounds_input
