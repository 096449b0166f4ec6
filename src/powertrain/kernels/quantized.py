"""Products with weights that a GPU reads as 8-bit floats or in blocks of 4 bits, and how W8A8 rounds their input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from powertrain.kernels.fused import silu_mul
from powertrain.kernels.gpu_provider import invariant_provider, refuse_gaps, triton_provider
from powertrain.kernels.op import Op, Provider
from powertrain.kernels.rounding import quantize_to_float8, quantize_to_int8, silu_mul_rounded

FLOAT8_BLOCK = 128
"""Outputs and inputs that share a scale in a matrix of blocks, and inputs of one row in its activations."""

MAX_UNROUNDED_ROWS = {torch.float8_e4m3fn: 1, torch.int8: 32}
"""W8A8 with weights of a type rounds its input above as many rows on a GPU. For a few the weights' bytes bound the
product and the input stays as it is, where a product that takes it so is as fast.
"""

INT4_BLOCKS = (128, 64, 32)
"""Inputs of a block of 4-bit weights: the largest that makes groups of whole blocks is taken."""

MIN_INT4_WORDS = 16
"""Of a block: the tensor cores take as many inputs at once."""


def dequantize_float8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in] of values float8_e4m3fn [out, in] and scale [out] or [out / 128, in / 128], rounded up."""
    if scale.ndim == 1:
        return values.float() * scale.float().unsqueeze(1)
    rows, columns = values.shape
    spread = scale.float().repeat_interleave(FLOAT8_BLOCK, 0)[:rows].repeat_interleave(FLOAT8_BLOCK, 1)[:, :columns]
    return values.float() * spread


def _int8_rounded_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [rows, in], each row rounded to 8 bits, times (values * scale)^T; values int8 [out, in], scale [out]."""
    narrow, own = quantize_to_int8(x)
    return ((narrow.float() * own) @ (values.float() * scale.float().unsqueeze(1)).t()).to(x.dtype)


def _float8_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    rounds_input: bool,
    is_gated: bool,
    keeps_pieces: bool = False,
) -> torch.Tensor:
    """x [rows, in] times the transposed matrix of 8-bit floats (see `dequantize_float8`); returns x's dtype.

    `rounds_input`: each row of x, or each 128 of its inputs for a matrix of blocks, is rounded to 8-bit floats first.
    `is_gated`: the outputs are gate above up, and the result is silu(gate) * up [rows, out / 2]. `keeps_pieces`: a
    provider may leave the sum of several float32 [pieces, rows, out] to who uses the result.
    """
    weight = dequantize_float8(values, scale)
    wide = x.float()
    if rounds_input:
        group = FLOAT8_BLOCK if scale.ndim == 2 else None
        narrow, own = quantize_to_float8(x, group)
        wide = narrow.float() * own.repeat_interleave(group or x.shape[1], 1)[:, : x.shape[1]]
    product = (wide @ weight.t()).to(x.dtype)
    return silu_mul(product) if is_gated else product


class Int4Blocks(NamedTuple):
    """4-bit integers as a GPU reads them: `weight = (n - 8 - zero) * scale`, n in 0..15.

    values: [blocks, out, words], int16 of 4 nibbles or uint8 of 2: nibble k of word j, from the lowest bits up, belongs
    to input k * words + j of the block. What a program reads at once lies together, and so do the nibbles that are
    unpacked together. scale: float [groups, out], zero: int8 [groups, out] or None. A group is one or more whole
    blocks.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    @property
    def nibbles(self) -> int:
        """Of a word."""
        return self.values.element_size() * 2


def pack_int4_blocks(unsigned: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """The `values` of `Int4Blocks` from uint8 [out, in] of 0..15; None where no block size divides the groups."""
    block = next((size for size in INT4_BLOCKS if group_size % size == 0), None)
    if block is None:
        return None
    count, dtype = (4, torch.int16) if block >= 4 * MIN_INT4_WORDS else (2, torch.uint8)
    nibbles = unsigned.view(unsigned.shape[0], -1, count, block // count)
    words = nibbles[:, :, 0].to(dtype)
    for place in range(1, count):
        words |= nibbles[:, :, place].to(dtype) << (4 * place)
    return words.transpose(0, 1).contiguous()


def dequantize_int4_blocks(weight: Int4Blocks, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] in `dtype`, computed in float32."""
    blocks, out_features, _ = weight.values.shape
    groups = weight.scale.shape[0]
    nibbles = [(weight.values >> (4 * k)) & 15 for k in range(weight.nibbles)]
    integers = torch.cat(nibbles, dim=-1).to(torch.float32) - 8
    grouped = integers.view(groups, blocks // groups, out_features, -1)
    if weight.zero is not None:
        grouped = grouped - weight.zero.float().view(groups, 1, out_features, 1)
    grouped = grouped * weight.scale.float().view(groups, 1, out_features, 1)
    return grouped.flatten(0, 1).transpose(0, 1).reshape(out_features, -1).to(dtype)


def _int4_blocks_linear(
    x: torch.Tensor, weight: Int4Blocks, is_gated: bool, keeps_pieces: bool = False
) -> torch.Tensor:
    """x [rows, in] times the transposed matrix; the rest as in `float8_linear`. Returns x's dtype."""
    product = x @ dequantize_int4_blocks(weight, x.dtype).t()
    return silu_mul(product) if is_gated else product


def _providers(function: str, module: str = "quantized") -> tuple[Provider[Any, Any], ...]:
    return triton_provider(module, function, refuse_gaps), invariant_provider(function, refuse_gaps)


def _rounded_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    keeps_pieces: bool = False,
) -> torch.Tensor:
    """A product of rounded rows x [rows, in] (`Rounded`) with values [out, in] of the same type, scale [out].

    `keeps_pieces` as in `float8_linear`.
    """
    weight = values.float() * scale.float().unsqueeze(1)
    return ((x.float() * x_scale.unsqueeze(1)) @ weight.t()).to(dtype)


def _rounded_gated_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    to: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul_rounded` of a `rounded_linear` whose outputs are gate above up."""
    return silu_mul_rounded.reference(_rounded_linear(x, x_scale, values, scale, dtype), to)


def _of_rounded(function: str) -> tuple[Provider[Any, Any], ...]:
    return (triton_provider("rounded_matmul", function, refuse_gaps, dtypes=(torch.int8, torch.float8_e4m3fn)),)


rounded_linear = Op("rounded_linear", _rounded_linear, _of_rounded("rounded_linear"))
rounded_gated_linear = Op("rounded_gated_linear", _rounded_gated_linear, _of_rounded("rounded_gated_linear"))
float8_linear = Op("float8_linear", _float8_linear, _providers("float8_linear"))
int8_rounded_linear = Op("int8_rounded_linear", _int8_rounded_linear, _providers("int8_rounded_linear"))
int4_blocks_linear = Op("int4_blocks_linear", _int4_blocks_linear, _providers("int4_linear", "int4_matmul"))
