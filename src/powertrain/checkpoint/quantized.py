"""A layer's quantized matrix, whoever wrote the checkpoint: which format it has, loaded, and as it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from powertrain.checkpoint.awq import awq_scheme_of, load_awq_weight
from powertrain.checkpoint.compressed_tensors import load_int_weight, scheme_of
from powertrain.checkpoint.float4 import Float4Scheme, load_float4_weight
from powertrain.checkpoint.float8 import Float8Scheme, fp8_scheme_of, load_float8_weight, load_input_scale
from powertrain.checkpoint.gptq import gptq_scheme_of, load_gptq_weight
from powertrain.checkpoint.quantization_config import HEAD, quantization_of, refuse
from powertrain.checkpoint.source import Checkpoint
from powertrain.model.float4 import Float4, Float4Weight, concat_float4_weights
from powertrain.model.float8 import Float8, Float8Weight, ScaledFloat8Input, concat_float8_weights
from powertrain.model.quantized_input import QuantizedInput
from powertrain.model.reordered_input import ReorderedInput
from powertrain.model.weights import IntWeight, WeightFormat, concat_int_weights, pack_int_weight
from powertrain.types import ModelFileError, QuantScheme

METHODS = ("awq", "compressed-tensors", "fp8", "gptq")


class QuantizedMatrix(NamedTuple):
    """A matrix as its checkpoint has it. `rounds_input`: W8A8 or W4A8, to integers per `input_group` or to floats.

    `input_scale`: the one scale of inputs rounded to floats; None where scales are found at run time.
    """

    weight: IntWeight | Float8Weight | Float4Weight
    rounds_input: bool = False
    input_group: int | None = None
    input_scale: float | None = None


def load_quantized(checkpoint: Checkpoint, layer: str, shape: tuple[int, int]) -> QuantizedMatrix | None:
    """The matrix of the Linear `layer` of `shape` [out, in]; None if its config says that it is not quantized.

    Raises `ModelFileError` naming the field of `quantization_config` or the tensor that cannot be run or does not fit.
    """
    quantization = quantization_of(checkpoint.config)
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    if method == "gptq":
        gptq = gptq_scheme_of(quantization, layer)
        return None if gptq is None else QuantizedMatrix(load_gptq_weight(checkpoint, layer, gptq, shape))
    if method == "awq":
        awq = awq_scheme_of(quantization, layer)
        return None if awq is None else QuantizedMatrix(load_awq_weight(checkpoint, layer, awq, shape))
    if method == "fp8":
        has_head_scale = f"{HEAD}.weight_scale_inv" in checkpoint.names()
        float8 = fp8_scheme_of(quantization, layer, has_head_scale)
        return None if float8 is None else _float8_matrix(checkpoint, layer, float8, shape)
    if method == "compressed-tensors":
        scheme = scheme_of(checkpoint.config, layer)
        if isinstance(scheme, Float8Scheme):
            return _float8_matrix(checkpoint, layer, scheme, shape)
        if isinstance(scheme, Float4Scheme):
            return QuantizedMatrix(load_float4_weight(checkpoint, layer, scheme, shape))
        return None if scheme is None else _int_matrix(checkpoint, layer, scheme, shape)
    refuse(f"quant_method {method!r} cannot be run; {', '.join(METHODS)} can")


def _float8_matrix(checkpoint: Checkpoint, layer: str, scheme: Float8Scheme, shape: tuple[int, int]) -> QuantizedMatrix:
    input_scale = load_input_scale(checkpoint, layer) if scheme.has_input_scale else None
    weight = load_float8_weight(checkpoint, layer, scheme, shape)
    return QuantizedMatrix(weight, scheme.rounds_input, input_scale=input_scale)


def _int_matrix(checkpoint: Checkpoint, layer: str, scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedMatrix:
    weight = load_int_weight(checkpoint, layer, scheme)
    if tuple(weight.values.shape) != shape:
        raise ModelFileError(
            f"{checkpoint.path}: {layer} has shape {list(weight.values.shape)}, expected {list(shape)}"
        )
    return QuantizedMatrix(weight, scheme.activation_bits is not None, scheme.activation_group_size)


def running_formats(
    matrices: Sequence[QuantizedMatrix], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[WeightFormat]:
    """The matrices of one product, which share their input, on `device`: one format if they agree, else one each.

    dtype: of the inputs to come, which is what a matrix becomes that is widened at load.
    """
    stacked = _stack(matrices)
    if stacked is None:
        return [_running_format(matrix, device, dtype) for matrix in matrices]
    return [_running_format(stacked, device, dtype)]


def _stack(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix | None:
    """One matrix of all outputs, or None where the matrices differ in more than their numbers."""
    first = matrices[0]
    if any(other[1:] != first[1:] for other in matrices):
        return None
    ints = [matrix.weight.widened() for matrix in matrices if isinstance(matrix.weight, IntWeight)]
    float8s = [matrix.weight for matrix in matrices if isinstance(matrix.weight, Float8Weight)]
    float4s = [matrix.weight for matrix in matrices if isinstance(matrix.weight, Float4Weight)]
    whole: IntWeight | Float8Weight | Float4Weight | None = None
    if len(float8s) == len(matrices) and len({weight.scale.ndim for weight in float8s}) == 1:
        whole = concat_float8_weights(float8s)
    elif len(float4s) == len(matrices) and len({weight.kind for weight in float4s}) == 1:
        whole = concat_float4_weights(float4s)
    elif len(ints) == len(matrices) and all(_is_same_grid(weight, ints[0]) for weight in ints):
        whole = concat_int_weights(ints)
    return None if whole is None else first._replace(weight=whole)


def _is_same_grid(one: IntWeight, other: IntWeight) -> bool:
    grids = [(w.num_bits, w.scale.shape[1], w.zero_point is None, w.input_order is None) for w in (one, other)]
    if grids[0] != grids[1]:
        return False
    return one.input_order is None or other.input_order is None or torch.equal(one.input_order, other.input_order)


def _running_format(matrix: QuantizedMatrix, device: torch.device, dtype: torch.dtype) -> WeightFormat:
    weight = matrix.weight
    if isinstance(weight, Float4Weight):
        return Float4.pack(weight, device, dtype)
    if isinstance(weight, Float8Weight):
        if matrix.input_scale is not None:
            return ScaledFloat8Input(Float8.pack(weight, device, rounds_input=False), matrix.input_scale)
        return Float8.pack(weight, device, matrix.rounds_input)
    packed = pack_int_weight(weight, device)
    if matrix.rounds_input:
        return QuantizedInput(packed, matrix.input_group)
    return packed if weight.input_order is None else ReorderedInput(packed, weight.input_order.to(device))
