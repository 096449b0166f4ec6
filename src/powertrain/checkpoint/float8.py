"""Checkpoints of 8-bit floats: a `weight` of float8_e4m3fn [out, in] with its scales beside it.

compressed-tensors (`float-quantized`) calls them `weight_scale`: one, one for each output, or one for each block of 128
by 128. Hugging Face's `quant_method` "fp8", as DeepSeek and Qwen publish, has `weight_scale_inv` [out / 128, in / 128],
rounded up. In both a weight is value * scale.
Formats: https://github.com/neuralmagic/compressed-tensors,
https://huggingface.co/docs/transformers/quantization/finegrained_fp8
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from powertrain.checkpoint.quantization_config import HEAD, names_of, refuse, refuse_overrides
from powertrain.checkpoint.source import Checkpoint, load_checked
from powertrain.kernels.quantized import FLOAT8_BLOCK
from powertrain.model.float8 import Float8Weight
from powertrain.types import ModelFileError

FLOAT8 = "float-quantized"
BLOCK = [FLOAT8_BLOCK, FLOAT8_BLOCK]
Strategy = Literal["tensor", "channel", "block"]


@dataclass(frozen=True, slots=True)
class Float8Scheme:
    """`strategy`: which weights share a scale. `rounds_input`: the input is rounded to 8-bit floats.

    Its scales are found at run time, or the file has one, `input_scale` (`has_input_scale`).
    `scale_name`: the last part of the name of the weights' scales.
    """

    strategy: Strategy
    rounds_input: bool
    scale_name: str = "weight_scale"
    has_input_scale: bool = False


def fp8_scheme_of(quantization: Mapping[str, Any], layer: str, has_head_scale: bool) -> Float8Scheme | None:
    """How the Linear `layer` is quantized under `quant_method` "fp8"; None if `modules_to_not_convert` names it.

    An entry names a layer by its whole name or a part of it between dots, or by a regular expression for its start.
    The head is quantized where the file has a scale for it (`has_head_scale`): configs that leave it out of their lists
    mean either. Raises `ModelFileError` naming the field of a `quantization_config` that cannot be run.
    """
    refuse_overrides(quantization, "modules_to_convert")
    for key, runnable in (("activation_scheme", "dynamic"), ("fmt", "e4m3"), ("scale_fmt", "float")):
        found = quantization.get(key)
        if found not in (None, runnable):
            refuse(f"{key} {found!r} cannot be run; {runnable} can")
    block = quantization.get("weight_block_size", BLOCK)
    if not isinstance(block, list | tuple) or list(block) != BLOCK:
        refuse(f"weight_block_size {block!r} cannot be run; {BLOCK} can")
    keys = ("modules_to_not_convert", "ignored_layers")
    if (layer == HEAD and not has_head_scale) or any(_is_named(layer, names_of(quantization, key)) for key in keys):
        return None
    return Float8Scheme("block", rounds_input=True, scale_name="weight_scale_inv")


def _is_named(layer: str, entries: list[str]) -> bool:
    try:
        return any(
            f".{entry}." in f".{layer}." or re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", layer) for entry in entries
        )
    except re.error as error:
        refuse(f"modules_to_not_convert holds no regular expression ({error})")


def load_float8_weight(
    checkpoint: Checkpoint, layer: str, scheme: Float8Scheme, shape: tuple[int, int]
) -> Float8Weight:
    """The 8-bit floats of one layer of `shape` [out, in]; one scale for all of them is repeated for each output.

    Raises `ModelFileError` naming the tensor that is missing or whose dtype or shape does not fit.
    """
    rows, columns = shape
    name = f"{layer}.{scheme.scale_name}"
    found = tuple(checkpoint.shape(name))
    shapes: dict[Strategy, list[tuple[int, ...]]] = {
        "tensor": [(1,), (), (1, 1)],
        "channel": [(rows, 1), (rows,)],
        "block": [(-(-rows // FLOAT8_BLOCK), -(-columns // FLOAT8_BLOCK))],
    }
    fitting = shapes[scheme.strategy]
    if found not in fitting:
        raise ModelFileError(f"{checkpoint.path}: {name} has shape {list(found)}, expected {list(fitting[0])}")
    values = load_checked(checkpoint, f"{layer}.weight", shape, torch.float8_e4m3fn)
    scale = load_checked(checkpoint, name, found).float()
    if scheme.strategy != "block":
        scale = scale.flatten().expand(rows).contiguous()
    return Float8Weight(values, scale)


def load_input_scale(checkpoint: Checkpoint, layer: str) -> float:
    """The one scale of a layer's inputs. Raises `ModelFileError` naming the tensor that is missing or cannot be."""
    name = f"{layer}.input_scale"
    scale = float(load_checked(checkpoint, name, () if tuple(checkpoint.shape(name)) == () else (1,)))
    if not 0 < scale < float("inf"):
        raise ModelFileError(f"{checkpoint.path}: {name} is {scale}, expected a positive number")
    return scale


def float8_weight_tensors(
    prefix: str, weight: Float8Weight, strategy: Strategy, input_scale: float | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of one layer (`model.layers.0.mlp.up_proj`) as compressed-tensors stores them.

    `strategy` is what the weight was rounded with. `input_scale`: of inputs that are rounded to one, absmax / 448.
    """
    scale = weight.scale
    if strategy != "block":
        scale = scale[:1] if strategy == "tensor" else scale.unsqueeze(1)
    tensors = {f"{prefix}.weight": weight.values, f"{prefix}.weight_scale": scale.contiguous()}
    if input_scale is not None:
        tensors[f"{prefix}.input_scale"] = torch.tensor([input_scale])
    return tensors
