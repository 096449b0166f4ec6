"""Triton products of few rows with 4-bit and 8-bit weights, which become floats in registers on their way.

The weights pass through once. 4 bits: the integers of one group of inputs are multiplied as they are and the sum takes
the group's scale, so that a weight costs no more than its unpacking.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from powertrain.kernels.fused import silu_mul
from powertrain.kernels.gpu.conversions import (
    byte_floats,
    int4_floats,
    quantize_rows,
    unpack_int4,
    widen_bytes,
)
from powertrain.kernels.gpu.launch import LINE_BYTES, launch_options, lines_ahead, prefetch, prefetch_rows, wait_turn
from powertrain.kernels.gpu.rounded_matmul import rounded_linear
from powertrain.kernels.gpu.splits import sum_splits
from powertrain.kernels.gpu.tuned_table import measured
from powertrain.kernels.quantized import FLOAT8_BLOCK, MAX_UNROUNDED_ROWS, Int4Blocks

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


@triton.jit
def _add_product(weight, x, acc, SWAPS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + the product of weight [outputs, inputs] and x [rows, inputs], as [outputs, rows] or [rows, outputs]."""
    if SWAPS:
        return tl.dot(weight, tl.trans(x), acc, input_precision=PRECISION)
    else:
        return tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)


@triton.jit
def _zeros(ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SWAPS: tl.constexpr):
    if SWAPS:
        return tl.zeros((OUTPUTS, ROWS), tl.float32)
    else:
        return tl.zeros((ROWS, OUTPUTS), tl.float32)


@triton.jit
def _by_output(scale, SWAPS: tl.constexpr):
    if SWAPS:
        return scale[:, None]
    else:
        return scale[None, :]


@triton.jit
def _store(out, acc, rows, columns, num_rows, out_features, SWAPS: tl.constexpr):
    at = out + tl.program_id(1) * num_rows * out_features
    if SWAPS:
        acc = tl.trans(acc)
    inside = (rows < num_rows)[:, None] & (columns < out_features)[None, :]
    tl.store(at + rows[:, None] * out_features + columns[None, :], acc.to(out.dtype.element_ty), inside)


@triton.jit
def _gate(gate, up, dtype: tl.constexpr):
    """silu(gate) * up, rounded where the product and the activation would be, were they apart."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return silu * up.to(dtype).to(tl.float32)


@triton.jit
def _int4_part(
    values,
    scale,
    zero,
    low_x,
    high_x,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    SWAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):
    """What one block of inputs adds: `values` points to bytes [outputs, half]; scale, zero: one an output."""
    packed = tl.load(values, eviction_policy="evict_first")
    low, high = unpack_int4(packed, low_x.dtype, IS_COMPILED)
    if HAS_ZERO:
        offset = zero.to(low_x.dtype)[:, None]
        low, high = low - offset, high - offset
    part = _add_product(low, low_x, _zeros(ROWS, packed.shape[0], SWAPS), SWAPS, PRECISION)
    part = _add_product(high, high_x, part, SWAPS, PRECISION)
    return part * _by_output(scale.to(tl.float32), SWAPS)


@triton.jit
def _of_group(scale, zero, at, HAS_ZERO: tl.constexpr):
    """The scales of a block's outputs, and the zero points or the scales again."""
    own = tl.load(scale + at)
    if HAS_ZERO:
        return own, tl.load(zero + at)
    else:
        return own, own


@triton.jit(do_not_specialize=["num_rows"])
def _int4_kernel(
    x,
    values,
    scale,
    zero,
    out,
    num_rows,
    out_features,
    num_blocks,
    x_stride,
    HALF: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SWAPS: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    BLOCKS_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    turns = tl.cdiv(num_blocks, tl.num_programs(1))
    first = tl.program_id(1) * turns
    end = tl.minimum(first + turns, num_blocks)
    # outputs past the end read the last one again: no mask in the loop
    column = tl.minimum(columns, out_features - 1)
    all_outputs = out_features * 2 if GATED else out_features
    stride = all_outputs.to(tl.int64) * HALF
    own = values + column[:, None] * HALF
    if BLOCKS_AHEAD > 0:
        # the weights are older than any kernel under way: the first can come while it still runs
        at = values + tl.minimum(tl.program_id(0) * OUTPUTS, out_features - OUTPUTS) * HALF
        blocks = tl.minimum(first + tl.arange(0, BLOCKS_AHEAD), end - 1)[:, None] * stride
        lines = tl.arange(0, OUTPUTS * HALF // LINE_BYTES)[None, :] * LINE_BYTES
        prefetch(at + blocks + lines)
        if GATED:
            prefetch(at + out_features * HALF + blocks + lines)
    wait_turn(PDL)
    x_at = x + tl.minimum(rows, num_rows - 1)[:, None] * x_stride + half[None, :]
    acc = _zeros(ROWS, OUTPUTS, SWAPS)
    up = _zeros(ROWS, OUTPUTS, SWAPS)
    # scales are too small for the pipeline's asynchronous copies: each turn begins with the loads of the next one's
    at = first // GROUP_BLOCKS * all_outputs + column
    scales, zeros = _of_group(scale, zero, at, HAS_ZERO)
    up_scales, up_zeros = scales, zeros
    if GATED:
        up_scales, up_zeros = _of_group(scale, zero, at + out_features, HAS_ZERO)
    for block in range(first, end):
        at = tl.minimum(block + 1, end - 1) // GROUP_BLOCKS * all_outputs + column
        next_scales, next_zeros = _of_group(scale, zero, at, HAS_ZERO)
        packed = own + half[None, :] + block * stride
        low_x = tl.load(x_at + block * (2 * HALF))
        high_x = tl.load(x_at + block * (2 * HALF) + HALF)
        acc += _int4_part(packed, scales, zeros, low_x, high_x, HAS_ZERO, ROWS, SWAPS, PRECISION, IS_COMPILED)
        scales, zeros = next_scales, next_zeros
        if GATED:
            next_scales, next_zeros = _of_group(scale, zero, at + out_features, HAS_ZERO)
            packed += out_features * HALF
            up += _int4_part(packed, up_scales, up_zeros, low_x, high_x, HAS_ZERO, ROWS, SWAPS, PRECISION, IS_COMPILED)
            up_scales, up_zeros = next_scales, next_zeros
    if GATED:
        acc = _gate(acc, up, x.dtype.element_ty)
    _store(out, acc, rows, columns, num_rows, out_features, SWAPS)


@triton.jit
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
        part = _add_product(weight, x, _zeros(ROWS, weight.shape[0], SWAPS), SWAPS, PRECISION)
        return acc + part * _by_output(tl.load(scale), SWAPS)
    else:
        return _add_product(weight, x, acc, SWAPS, PRECISION)


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
    wait_turn(PDL)
    x_at = x + tl.minimum(rows, num_rows - 1)[:, None] * x_stride + inputs[None, :]
    acc = _zeros(ROWS, OUTPUTS, SWAPS)
    up = _zeros(ROWS, OUTPUTS, SWAPS)
    for start in range(first, last, INPUTS):
        inside = (start + inputs < end)[None, :]
        a = tl.load(x_at + start, inside, other=0.0)
        at = own[:, None] + inputs[None, :] + start
        # a turn is one block of inputs, where there are blocks
        of_block = scale + column // INPUTS * num_turns + start // INPUTS
        acc = _matrix_part(at, of_block, a, acc, inside, HAS_BLOCKS, ROWS, SWAPS, PRECISION, IS_COMPILED)
        if GATED:
            of_block = scale + (column + out_features) // INPUTS * num_turns + start // INPUTS
            up = _matrix_part(at + half, of_block, a, up, inside, HAS_BLOCKS, ROWS, SWAPS, PRECISION, IS_COMPILED)
    if HAS_SCALE and not HAS_BLOCKS:
        acc *= _by_output(tl.load(scale + column), SWAPS)
        if GATED:
            up *= _by_output(tl.load(scale + out_features + column), SWAPS)
    if GATED:
        acc = _gate(acc, up, x.dtype.element_ty)
    _store(out, acc, rows, columns, num_rows, out_features, SWAPS)


def int4_linear(x: torch.Tensor, weight: Int4Blocks, is_gated: bool, keeps_pieces: bool = False) -> torch.Tensor:
    """`kernels.quantized.int4_blocks_linear`."""
    num_rows = x.shape[0]
    if is_gated and num_rows > MAX_GATED_ROWS:
        return silu_mul(int4_linear(x, weight, False))
    if num_rows > MAX_ROWS:
        return torch.nn.functional.linear(x, int4_floats(weight, x.dtype))
    num_blocks, all_outputs, _ = weight.values.shape
    out_features = all_outputs // 2 if is_gated else all_outputs
    config = config_for("int4", x, out_features, num_blocks, is_gated)
    return int4_product(x, weight, config, is_gated, keeps_pieces)


def float8_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    rounds_input: bool,
    is_gated: bool,
    keeps_pieces: bool = False,
) -> torch.Tensor:
    """`kernels.quantized.float8_linear`, whose input is rounded above `MAX_UNROUNDED_ROWS` rows only."""
    if x.shape[0] <= MAX_UNROUNDED_ROWS or not rounds_input or scale.ndim == 2:
        return byte_linear(x, values, scale, is_gated, keeps_pieces)
    narrow, own = quantize_rows(x, torch.float8_e4m3fn)
    product = rounded_linear(narrow, own, values, scale, x.dtype, keeps_pieces)
    return silu_mul(product) if is_gated else product


def int8_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`kernels.matmul.int8_linear`."""
    return byte_linear(x, values, scale, is_gated=False)


def int8_rounded_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`kernels.quantized.int8_rounded_linear`, whose input is rounded above `MAX_UNROUNDED_ROWS` rows only."""
    if x.shape[0] <= MAX_UNROUNDED_ROWS:
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
    config = config_for(product, x, out_features, -(-in_features // FLOAT8_BLOCK), is_gated)
    return matrix_product(x, values, scale, config, is_gated, keeps_pieces)


def int4_product(
    x: torch.Tensor, weight: Int4Blocks, config: QuantizedConfig, is_gated: bool = False, keeps_pieces: bool = False
) -> torch.Tensor:
    """x [rows <= 256, in] times the transposed matrix; `is_gated` as in `gated_linear`, in one split.

    `keeps_pieces`: the result of several splits is float32 [splits, rows, out], which are still to be summed.
    """
    num_rows = x.shape[0]
    num_blocks, all_outputs, half = weight.values.shape
    out_features = all_outputs // 2 if is_gated else all_outputs
    out, target = _targets(x, out_features, config.splits)
    grid = (triton.cdiv(out_features, config.outputs), config.splits)
    # a program's bytes of a block lie in a row; where it has fewer outputs than that it asks for none
    lines = lines_ahead(config.outputs * (2 if is_gated else 1), x.device) if out_features >= config.outputs else 0
    _int4_kernel[grid](
        x,
        weight.values,
        weight.scale,
        weight.zero if weight.zero is not None else weight.values,
        target,
        num_rows,
        out_features,
        num_blocks,
        x.stride(0),
        HALF=half,
        GROUP_BLOCKS=num_blocks // weight.scale.shape[0],
        HAS_ZERO=weight.zero is not None,
        OUTPUTS=config.outputs,
        GATED=is_gated,
        BLOCKS_AHEAD=lines * LINE_BYTES.value // half,
        **_shared_options(x, config),
    )
    return target if config.splits == 1 or keeps_pieces else sum_splits(target, out)


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
    `keeps_pieces` as in `int4_product`.
    """
    num_rows, in_features = x.shape
    out_features = values.shape[0] // 2 if is_gated else values.shape[0]
    out, target = _targets(x, out_features, config.splits)
    grid = (triton.cdiv(out_features, config.outputs), config.splits)
    _matrix_kernel[grid](
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
        **_shared_options(x, config),
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


def _targets(x: torch.Tensor, out_features: int, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and what the kernel writes: the same, or float32 [splits, rows, out] whose sum it is."""
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    if splits == 1:
        return out, out
    return out, torch.empty(splits, *out.shape, dtype=torch.float32, device=x.device)


def _shared_options(x: torch.Tensor, config: QuantizedConfig) -> dict[str, Any]:
    return {
        "ROWS": max(16, triton.next_power_of_2(x.shape[0])),
        "SWAPS": config.swaps,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "IS_COMPILED": x.is_cuda,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **launch_options(x),
    }
