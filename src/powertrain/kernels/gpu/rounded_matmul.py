"""A Triton product of rounded activations with 8-bit weights of the same type, for the rows between few and many.

Up to 256 rows the time is that of the weights' way from memory, if each passes once and little else is read. Every
program reads its rows anew from the cache, so the more outputs it has the less comes through there: it may keep the
sums of two tiles of them. Float8 is summed by Hopper's tensor cores to 14 bits or so; each turn's product is added in
float32 (as DeepSeek-V3 does, arXiv 2412.19437, section 3.3.2), for which two tiles need the room of one product only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powertrain.kernels.gpu.activation import gated
from powertrain.kernels.gpu.conversions import quantize_rows, scale_integers
from powertrain.kernels.gpu.launch import (
    device_function,
    launch,
    launch_options,
    lines_ahead,
    num_processors,
    prefetch_rows,
    wait_turn,
)
from powertrain.kernels.gpu.splits import sum_splits
from powertrain.kernels.gpu.tuned_table import measured
from powertrain.kernels.rounding import silu_mul_rounded

FEW_ROWS = 64
"""Of a tile of the tensor cores, whose other side are outputs."""


class RoundedConfig(NamedTuple):
    """Launch settings: rows and outputs of a tile, tiles of outputs that a program sums, inputs of a turn, pieces of
    the inputs that are summed apart, whether outputs are the rows of the tensor cores' tiles, warps, stages."""

    tile_rows: int
    outputs: int
    tiles: int
    inputs: int
    splits: int
    swaps: bool
    num_warps: int
    num_stages: int


@device_function
def _zeros(dtype: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SWAPS: tl.constexpr):
    sums: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    if SWAPS:
        return tl.zeros((OUTPUTS, ROWS), sums)
    else:
        return tl.zeros((ROWS, OUTPUTS), sums)


@device_function
def _add_product(values, x, acc, inside, SWAPS: tl.constexpr):
    """acc + the product of what `values` points to, [outputs, inputs], and x [rows, inputs]."""
    weight = tl.load(values, inside, other=0.0, eviction_policy="evict_first")
    if SWAPS:
        left, right = weight, tl.trans(x)
    else:
        left, right = x, tl.trans(weight)
    if weight.dtype == tl.int8:
        return tl.dot(left, right, acc, out_dtype=tl.int32)
    else:
        # a sum outside of the dot; inside, `max_num_imprecise_acc` waits for the tensor cores after each instruction
        return acc + tl.dot(left, right)


@device_function
def _scaled(acc, row_scale, scale, SWAPS: tl.constexpr):
    """The sums with their scales as float32 [rows, outputs]."""
    if SWAPS:
        acc = tl.trans(acc)
    return acc.to(tl.float32) * row_scale[:, None] * scale[None, :]


@device_function
def _store(out, result, rows, columns, num_rows, out_features):
    at = out + tl.program_id(1).to(tl.int64) * num_rows * out_features
    inside = (rows < num_rows)[:, None] & (columns < out_features)[None, :]
    tl.store(at + rows[:, None] * out_features + columns[None, :], result.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_rows"])
def _rounded_kernel(
    x,
    x_scale,
    values,
    scale,
    out,
    num_rows,
    out_features,
    in_features,
    x_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILES: tl.constexpr,
    INPUTS: tl.constexpr,
    SWAPS: tl.constexpr,
    GATED: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    # programs of the same outputs and other rows run side by side: their weights come from memory once
    row_tiles = tl.cdiv(num_rows, ROWS)
    rows = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    first_tile = tl.program_id(0) // row_tiles * (1 if GATED else TILES)
    columns = first_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    turns = tl.cdiv(tl.cdiv(in_features, INPUTS), tl.num_programs(1))
    first = tl.program_id(1) * turns * INPUTS
    end = tl.minimum(first + turns * INPUTS, in_features)
    # at least one turn, maybe of zeros: around a loop that may be skipped the tensor cores' work is not overlapped
    last = tl.maximum(end, first + 1)
    tl.assume(first < last)
    # outputs past the end read the last one again: the loop masks inputs and rows only
    row = tl.minimum(rows, num_rows - 1)
    column = tl.minimum(columns, out_features - 1)
    next_column = column + out_features if GATED else tl.minimum(columns + OUTPUTS, out_features - 1)
    own = values + column.to(tl.int64) * in_features
    next_own = values + next_column.to(tl.int64) * in_features
    if LINES > 0:
        prefetch_rows(own, first, in_features, LINES)
        if TILES == 2:
            prefetch_rows(next_own, first, in_features, LINES)
    # asked for before all else: at the end their way from the memory would be waited for
    of_output, of_next_output = tl.load(scale + column), tl.load(scale + next_column)
    wait_turn(PDL)
    row_scale = tl.load(x_scale + row)
    x_at = x + row[:, None] * x_stride + inputs[None, :]
    is_row = (rows < num_rows)[:, None]
    acc = _zeros(x.dtype.element_ty, ROWS, OUTPUTS, SWAPS)
    next_acc = _zeros(x.dtype.element_ty, ROWS, OUTPUTS, SWAPS)
    for start in range(first, last, INPUTS):
        at = start + inputs[None, :]
        a = tl.load(x_at + start, (at < end) & is_row, other=0.0)
        acc = _add_product(own[:, None] + at, a, acc, at < end, SWAPS)
        if TILES == 2:
            next_acc = _add_product(next_own[:, None] + at, a, next_acc, at < end, SWAPS)
    result = _scaled(acc, row_scale, of_output, SWAPS)
    if TILES == 2:
        next_result = _scaled(next_acc, row_scale, of_next_output, SWAPS)
        if GATED:
            result = gated(result, next_result, out.dtype.element_ty)
        else:
            _store(out, next_result, rows, columns + OUTPUTS, num_rows, out_features)
    _store(out, result, rows, columns, num_rows, out_features)


def rounded_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    config: RoundedConfig,
    is_gated: bool = False,
    keeps_pieces: bool = False,
) -> torch.Tensor:
    """x [rows, in] times the transposed values [out, in], both int8 or float8_e4m3fn, in `dtype`.

    x_scale: float32 [rows]; scale: float32 [out]. `is_gated` as in `gated_linear`, in one split and two tiles.
    `keeps_pieces`: the result of several splits is float32 [splits, rows, out], which are still to be summed.
    """
    assert not is_gated or (config.tiles, config.splits) == (2, 1)
    num_rows, in_features = x.shape
    out_features = values.shape[0] // 2 if is_gated else values.shape[0]
    tile_rows = min(config.tile_rows, max(16, triton.next_power_of_2(num_rows)))
    out = torch.empty(num_rows, out_features, dtype=dtype, device=x.device)
    pieces = out if config.splits == 1 else torch.empty(config.splits, *out.shape, device=x.device)
    of_program = config.outputs * (1 if is_gated else config.tiles)
    grid = (triton.cdiv(out_features, of_program) * triton.cdiv(num_rows, tile_rows), config.splits)
    launch(_rounded_kernel, grid)(
        x,
        x_scale,
        values,
        scale,
        pieces,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        ROWS=tile_rows,
        OUTPUTS=config.outputs,
        TILES=config.tiles,
        INPUTS=config.inputs,
        SWAPS=config.swaps,
        GATED=is_gated,
        LINES=lines_ahead(config.outputs * config.tiles, x.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x),
    )
    return pieces if config.splits == 1 or keeps_pieces else sum_splits(pieces, out)


def rounded_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    keeps_pieces: bool = False,
) -> torch.Tensor:
    """`kernels.quantized.rounded_linear`, by the library unless measured settings say that it is slower."""
    config = rounded_config(x, values.shape[0], dtype)
    if config is None:
        return library_product(x, x_scale, values, scale, dtype)
    return rounded_product(x, x_scale, values, scale, dtype, config, keeps_pieces=keeps_pieces)


def rounded_gated_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    to: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.quantized.rounded_gated_linear`, gated by the product where that was measured."""
    config = rounded_config(x, values.shape[0] // 2, dtype, is_gated=True)
    if config is None:
        return silu_mul_rounded(rounded_linear(x, x_scale, values, scale, dtype), to)
    return quantize_rows(rounded_product(x, x_scale, values, scale, dtype, config, is_gated=True), to)


def library_product(
    x: torch.Tensor, x_scale: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`kernels.quantized.rounded_linear` for any number of rows."""
    if x.dtype == torch.int8:
        return scale_integers(torch._int_mm(x, values.t()), x_scale, scale, dtype)
    product = torch._scaled_mm(
        x, values.t(), scale_a=x_scale.unsqueeze(1), scale_b=scale.unsqueeze(0), out_dtype=torch.bfloat16
    )
    return product.to(dtype)


def rounded_config(
    x: torch.Tensor, out_features: int, dtype: torch.dtype, is_gated: bool = False
) -> RoundedConfig | None:
    """The settings of `rounded_product`, measured or, for few rows of floats, a guess; None leaves it to the library.

    Its product of 8-bit floats is made for many rows; that of integers does not take few, and is not asked.
    """
    num_rows, in_features = x.shape
    if dtype == torch.bfloat16:
        product = "int8 rounded" if x.dtype == torch.int8 else "fp8 rounded"
        found = measured(f"{product} bfloat16", x.device, out_features, in_features, num_rows, is_gated)
        if found is not None:
            return RoundedConfig(*(found[field] for field in RoundedConfig._fields))
    if num_rows > FEW_ROWS or x.dtype == torch.int8:
        return None
    if is_gated:
        return RoundedConfig(64, 64, 2, 256, 1, True, 4, 3)
    # pieces of at least 1,024 inputs until there are programs for every processor
    splits = 1
    while splits * out_features < num_processors(x.device) * 64 and splits * 2048 <= in_features:
        splits *= 2
    return RoundedConfig(64, 64, 1, 256, splits, True, 4, 4)
