"""compressed-tensors' 4-bit floats: `nvfp4-pack-quantized` and `mxfp4-pack-quantized`.

Both store `weight_packed`, uint8 [out, in / 2], the first of two codes in the low bits, and `weight_scale`: NVFP4
float8_e4m3fn [out, in / 16], beside a float32 `weight_global_scale` [1] that divides; MXFP4 uint8 [out, in / 32],
exponents of two biased by 127.
Format: https://github.com/neuralmagic/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from powertrain.checkpoint.quantization_config import refuse
from powertrain.checkpoint.source import Checkpoint, load_checked
from powertrain.kernels.float4 import LARGEST_EXPONENT, MXFP4_GROUP, NVFP4_GROUP
from powertrain.model.float4 import Float4Weight
from powertrain.types import ModelFileError

NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FLOAT4_FORMATS = (NVFP4, MXFP4)


@dataclass(frozen=True, slots=True)
class Float4Scheme:
    """4-bit floats whose input stays as it is. `group_size`: 16 is NVFP4, 32 MXFP4."""

    group_size: int

    @property
    def format(self) -> str:
        return NVFP4 if self.group_size == NVFP4_GROUP else MXFP4


def float4_weight_tensors(prefix: str, weight: Float4Weight) -> dict[str, torch.Tensor]:
    """The tensors of one layer (`model.layers.0.mlp.up_proj`) as they stand in the file.

    Raises `ValueError` for stacked NVFP4 matrices: a file has one divisor for each.
    """
    tensors = {f"{prefix}.weight_packed": weight.packed, f"{prefix}.weight_scale": weight.scale}
    if weight.global_scale is not None:
        if weight.global_scale.shape != (1,):
            raise ValueError(f"{prefix}: stacked matrices have no one global scale")
        tensors[f"{prefix}.weight_global_scale"] = weight.global_scale
    return tensors


def load_float4_weight(
    checkpoint: Checkpoint, layer: str, scheme: Float4Scheme, shape: tuple[int, int]
) -> Float4Weight:
    """The 4-bit floats of one layer of `shape` [out, in].

    Raises `ModelFileError` naming the tensor that is missing, whose dtype or shape does not fit, or that holds NaN.
    """
    rows, columns = shape
    size = scheme.group_size

    def fail(suffix: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{checkpoint.path}: {layer}.{suffix} {problem}")

    if columns % size:
        raise fail("weight_packed", f"has rows of {columns}, which groups of {size} do not divide")
    packed = load_checked(checkpoint, f"{layer}.weight_packed", (rows, columns // 2), torch.uint8)
    groups = (rows, columns // size)
    if scheme.format == MXFP4:
        scale = load_checked(checkpoint, f"{layer}.weight_scale", groups, torch.uint8)
        if bool((scale > LARGEST_EXPONENT).any()):
            raise fail("weight_scale", "holds NaN; the file is damaged")
        return Float4Weight(packed, scale, None)
    scale = load_checked(checkpoint, f"{layer}.weight_scale", groups, torch.float8_e4m3fn)
    if bool(scale.float().isnan().any()):
        raise fail("weight_scale", "holds NaN; the file is damaged")
    name = f"{layer}.weight_global_scale"
    # some writers leave out the dimension of one number
    divisor = load_checked(checkpoint, name, () if tuple(checkpoint.shape(name)) == () else (1,), torch.float32)
    if not 0 < float(divisor) < float("inf"):
        raise fail("weight_global_scale", f"is {float(divisor)}, expected a positive number")
    return Float4Weight(packed, scale, divisor.reshape(1))


def float4_scheme_of(group: Mapping[str, Any], stored_format: str) -> Float4Scheme:
    """How a config group of one of `FLOAT4_FORMATS` stores its weights.

    Raises `ModelFileError` naming the field of `quantization_config` that cannot be run.
    """
    weights = group["weights"]
    is_nvfp4 = stored_format == NVFP4
    size, strategy = (NVFP4_GROUP, "tensor_group") if is_nvfp4 else (MXFP4_GROUP, "group")
    found = [weights.get(key, default) for key, default in (("num_bits", 8), ("type", "int"), ("symmetric", True))]
    if found != [4, "float", True] or weights.get("dynamic") not in (None, False):
        refuse(f"format {stored_format!r} can be run with static symmetric float weights of 4 bits only")
    if weights.get("strategy") != strategy or weights.get("group_size") != size:
        refuse(
            f"strategy {weights.get('strategy')!r} with group_size {weights.get('group_size')!r} cannot be run for "
            f"format {stored_format!r}; {strategy} of {size} can"
        )
    scale_dtype = "torch.float8_e4m3fn" if is_nvfp4 else "torch.uint8"
    if weights.get("scale_dtype") not in (None, scale_dtype):
        refuse(f"scale_dtype {weights['scale_dtype']!r} cannot be run for format {stored_format!r}; {scale_dtype} can")
    if group.get("input_activations") is not None:
        name = "NVFP4A16" if is_nvfp4 else "MXFP4A16"
        refuse(f"input_activations: beside 4-bit float weights only inputs that are not rounded can be run ({name})")
    return Float4Scheme(size)
