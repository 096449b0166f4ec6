"""Triton products of few rows with 8-bit weights, which become floats in registers on their way and pass through once.

What products with 4-bit weights (`int4_matmul.py`) share with them stands here too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from powertrain.kernels.fused import silu_mul
from powertrain.kernels.gpu.activation import gated
from powertrain.kernels.gpu.conversions import byte_floats, quantize_rows, widen_bytes
from powertrain.kernels.gpu.launch import device_function, launch, launch_options, lines_ahead, prefetch_rows, wait_turn
from powertrain.kernels.gpu.rounded_matmul import rounded_linear
from powertrain.kernels.gpu.row_matmul import row_config, row_product
from powertrain.kernels.gpu.splits import sum_splits
from powertrain.kernels.gpu.tuned_table import measured
from powertrain.kernels.quantized import FLOAT8_BLOCK, MAX_UNROUNDED_ROWS

MAX_ROWS = 256
"""More rows are bound by arithmetic: then the weights are made floats once and the library multiplies."""

MAX_GATED_ROWS = 64
"""The sums of gate and up for more rows do not fit in a program's registers together."""


class QuantizedConfig(NamedTuple):
    """Launch settings: outputs of a program, pieces of the inputs that are summed apart, whether outputs are the rows
    of the tensor cores' tiles instead of the activations, warps, stages."""

    outputs: int
    splits: int
    swaps: bool
    num_warps: int
    num_stages: int


@device_function
def add_product(weight, x, acc, SWAPS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + the product of weight [outputs, inputs] and x [rows, inputs], as [outputs, rows] or [rows, outputs]."""
    if SWAPS:
        return tl.dot(weight, tl.trans(x), acc, input_precision=PRECISION)
    else:
        return tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)


@device_function
def zero_sums(ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SWAPS: tl.constexpr):
    if SWAPS:
        return tl.zeros((OUTPUTS, ROWS), tl.float32)
    else:
        return tl.zeros((ROWS, OUTPUTS), tl.float32)


@device_function
def by_output(scale, SWAPS: tl.constexpr):
    if SWAPS:
        return scale[:, None]
    else:
        return scale[None, :]


@device_function
def store_sums(out, acc, rows, columns, num_rows, out_features, SWAPS: tl.constexpr):
    at = out + tl.program_id(1) * num_rows * out_features
    if SWAPS:
        acc = tl.trans(acc)
    inside = (rows < num_rows)[:, None] & (columns < out_features)[None, :]
    tl.store(at + rows[:, None] * out_features + columns[None, :], acc.to(out.dtype.element_ty), inside)


@device_function
def _matrix_part(
    values,
    scale,
    x,
    acc,
    inside,
    HAS_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    SWAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):
    """acc with what one turn of inputs adds; `scale` points to each output's in this block, if there are blocks."""
    weight = tl.load(values, inside, other=0.0, eviction_policy="evict_first")
    weight = widen_bytes(weight, x.dtype, IS_COMPILED)
    if HAS_BLOCKS:
        part = add_product(weight, x, zero_sums(ROWS, weight.shape[0], SWAPS), SWAPS, PRECISION)
        return acc + part * by_output(tl.load(scale), SWAPS)
    else:
        return add_product(weight, x, acc, SWAPS, PRECISION)


@triton.jit(do_not_specialize=["num_rows"])
def _matrix_kernel(
    x,
    values,
    scale,
    out,
    num_rows,
    out_features,
    in_features,
    x_stride,
    INPUTS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SWAPS: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.arange(0, ROWS)
    inputs = tl.arange(0, INPUTS)
    num_turns = tl.cdiv(in_features, INPUTS)
    turns = tl.cdiv(num_turns, tl.num_programs(1))
    first = tl.program_id(1) * turns * INPUTS
    end = tl.minimum(first + turns * INPUTS, in_features)
    last = end
    if not HAS_BLOCKS:
        # at least one turn, maybe of zeros: around a loop that may be skipped the tensor cores' work is not overlapped
        last = tl.maximum(end, first + 1)
        tl.assume(first < last)
    column = tl.minimum(columns, out_features - 1)
    own = values + column.to(tl.int64) * in_features
    half = out_features.to(tl.int64) * in_features
    if LINES > 0:
        prefetch_rows(own, first, in_features, LINES)
        if GATED:
            prefetch_rows(own + half, first, in_features, LINES)
    of_output, up_of_output = column, column
    if HAS_SCALE and not HAS_BLOCKS:
        # asked for before all else: at the end their way from the memory would be waited for
        of_output = tl.load(scale + column)
        up_of_output = tl.load(scale + out_features + column) if GATED else of_output
    wait_turn(PDL)
    x_at = x + rows[:, None] * x_stride + inputs[None, :]
    # rows past the end are not read: the same few lines, asked for by all programs at once, would hold them up
    is_row = (rows < num_rows)[:, None]
    acc = zero_sums(ROWS, OUTPUTS, SWAPS)
    up = zero_sums(ROWS, OUTPUTS, SWAPS)
    for start in range(first, last, INPUTS):
        inside = (start + inputs < end)[None, :]
        a = tl.load(x_at + start, inside & is_row, other=0.0)
        at = own[:, None] + inputs[None, :] + start
        # a turn is one block of inputs, where there are blocks
        of_block = scale + column // INPUTS * num_turns + start // INPUTS
        acc = _matrix_part(at, of_block, a, acc, inside, HAS_BLOCKS, ROWS, SWAPS, PRECISION, IS_COMPILED)
        if GATED:
            of_block = scale + (column + out_features) // INPUTS * num_turns + start // INPUTS
            up = _matrix_part(at + half, of_block, a, up, inside, HAS_BLOCKS, ROWS, SWAPS, PRECISION, IS_COMPILED)
    if HAS_SCALE and not HAS_BLOCKS:
        acc *= by_output(of_output, SWAPS)
        if GATED:
            up *= by_output(up_of_output, SWAPS)
    if GATED:
        acc = gated(acc, up, x.dtype.element_ty)
    store_sums(out, acc, rows, columns, num_rows, out_features, SWAPS)


def float8_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    rounds_input: bool,
    is_gated: bool,
    keeps_pieces: bool = False,
) -> torch.Tensor:
    """`kernels.quantized.float8_linear`, whose input is rounded above `MAX_UNROUNDED_ROWS` rows only."""
    if x.shape[0] <= MAX_UNROUNDED_ROWS[values.dtype] or not rounds_input or scale.ndim == 2:
        return byte_linear(x, values, scale, is_gated, keeps_pieces)
    narrow, own = quantize_rows(x, torch.float8_e4m3fn)
    product = rounded_linear(narrow, own, values, scale, x.dtype, keeps_pieces)
    return silu_mul(product) if is_gated else product


def int8_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`kernels.matmul.int8_linear`."""
    return byte_linear(x, values, scale, is_gated=False)


def int8_rounded_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`kernels.quantized.int8_rounded_linear`, whose input is rounded above `MAX_UNROUNDED_ROWS` rows only."""
    if x.shape[0] <= MAX_UNROUNDED_ROWS[values.dtype]:
        return byte_linear(x, values, scale, is_gated=False)
    narrow, own = quantize_rows(x, torch.int8)
    return rounded_linear(narrow, own, values, scale, x.dtype)


def byte_linear(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, is_gated: bool, keeps_pieces: bool = False
) -> torch.Tensor:
    """x [rows, in] times the transposed values [out, in], int8 or float8_e4m3fn, with scales as `matrix_product`."""
    num_rows, in_features = x.shape
    if is_gated and num_rows > MAX_GATED_ROWS:
        return silu_mul(byte_linear(x, values, scale, False))
    if num_rows > MAX_ROWS:
        return torch.nn.functional.linear(x, byte_floats(values, scale, x.dtype))
    out_features = values.shape[0] // 2 if is_gated else values.shape[0]
    product = "int8" if values.dtype == torch.int8 else "fp8 blocks" if scale.ndim == 2 else "fp8"
    alone = row_config(f"row {product}", x, out_features, is_gated) if scale.ndim == 1 else None
    if alone is not None:
        return row_product(x, values, scale, alone, is_gated)
    config = config_for(product, x, out_features, -(-in_features // FLOAT8_BLOCK), is_gated)
    return matrix_product(x, values, scale, config, is_gated, keeps_pieces)


def matrix_product(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor | None,
    config: QuantizedConfig,
    is_gated: bool = False,
    keeps_pieces: bool = False,
) -> torch.Tensor:
    """x [rows <= 256, in] times the transposed values [out, in]: int8, float8_e4m3fn, or x's dtype.

    scale: float32 [out], or [out / 128, in / 128] rounded up, or None. `is_gated` as in `gated_linear`, in one split;
    `keeps_pieces`: the result of several
    splits is float32 [splits, rows, out], which are still to be summed.
    """
    num_rows, in_features = x.shape
    out_features = values.shape[0] // 2 if is_gated else values.shape[0]
    out, target = result_and_target(x, out_features, config.splits)
    grid = (triton.cdiv(out_features, config.outputs), config.splits)
    launch(_matrix_kernel, grid)(
        x,
        values,
        scale if scale is not None else values,
        target,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        # of bytes a turn is a block of scales; wider elements would fill the shared memory with as many
        INPUTS=FLOAT8_BLOCK if values.element_size() == 1 else FLOAT8_BLOCK // 2,
        HAS_SCALE=scale is not None,
        HAS_BLOCKS=scale is not None and scale.ndim == 2,
        OUTPUTS=config.outputs,
        GATED=is_gated,
        LINES=lines_ahead(config.outputs * (2 if is_gated else 1), x.device),
        **shared_options(x, config),
    )
    return target if config.splits == 1 or keeps_pieces else sum_splits(target, out)


def config_for(product: str, x: torch.Tensor, out_features: int, turns: int, is_gated: bool) -> QuantizedConfig:
    """The measured settings of `product` ("int4", say), else a guess: programs for every processor, runs of turns."""
    num_rows, in_features = x.shape
    if x.dtype == torch.bfloat16:
        found = measured(f"{product} bfloat16", x.device, out_features, in_features, num_rows, is_gated)
        if found is not None:
            return QuantizedConfig(*(found[field] for field in QuantizedConfig._fields))
    if num_rows > 128:
        outputs, warps, stages = 128, 8, 3
    elif num_rows > 32:
        outputs, warps, stages = 64, 4, 5 if num_rows <= 64 else 4
    else:
        outputs, warps, stages = (32 if is_gated or out_features < 8192 else 64), 2, 5
    splits = 1
    while not is_gated and splits < 8 and splits * out_features < 264 * outputs and turns >= 16 * splits:
        splits *= 2
    return QuantizedConfig(outputs, splits, num_rows > 32, warps, stages)


def tile_config(x: torch.Tensor, out_features: int, *, is_gated: bool) -> QuantizedConfig | None:
    """The measured settings of `matrix_product` for a dense matrix; None where another product was found faster."""
    found = measured("tile bfloat16", x.device, out_features, x.shape[1], x.shape[0], is_gated)
    if found is None or x.dtype != torch.bfloat16:
        return None
    return QuantizedConfig(*(found[field] for field in QuantizedConfig._fields))


def result_and_target(x: torch.Tensor, out_features: int, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and what the kernel writes: the same, or float32 [splits, rows, out] whose sum it is."""
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    if splits == 1:
        return out, out
    return out, torch.empty(splits, *out.shape, dtype=torch.float32, device=x.device)


def shared_options(x: torch.Tensor, config: QuantizedConfig) -> dict[str, Any]:
    return {
        "ROWS": max(16, triton.next_power_of_2(x.shape[0])),
        "SWAPS": config.swaps,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "IS_COMPILED": x.is_cuda,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **launch_options(x),
    }
