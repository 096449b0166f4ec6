"""Triton products of few rows with 4-bit weights, whose words become floats in registers on their way.

The integers of one group of inputs are multiplied as they are and the sum takes the group's scale (Frantar et al. 2024,
arXiv 2408.11743), so that a weight costs no more than its unpacking. At few rows instructions bound the product before
the memory does: a word's nibbles stand for inputs so far apart that each makes, with the same nibble of the word beside
it, one register as the tensor cores want it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powertrain.kernels.fused import silu_mul
from powertrain.kernels.gpu.activation import gated
from powertrain.kernels.gpu.conversions import int4_floats, unpack_nibbles
from powertrain.kernels.gpu.launch import LINE_BYTES, device_function, launch, lines_ahead, prefetch, wait_turn
from powertrain.kernels.gpu.quantized import (
    MAX_GATED_ROWS,
    MAX_ROWS,
    QuantizedConfig,
    add_product,
    by_output,
    config_for,
    result_and_target,
    shared_options,
    store_sums,
    zero_sums,
)
from powertrain.kernels.gpu.row_matmul import row_config, row_int4_product
from powertrain.kernels.gpu.sliced_matmul import load_inputs, sliced_config, sliced_int4_product
from powertrain.kernels.gpu.splits import sum_splits
from powertrain.kernels.quantized import Int4Blocks

BLOCKS_AT_ONCE = tl.constexpr(32)
"""Whose scales one prefetch asks for."""

TILE_ROWS = 128
"""Of a program: for more a group's sums beside all sums do not fit in its registers. The tiles of more rows read the
same weights at the same time, which come from the memory once."""


@device_function
def _add_block(
    acc,
    values,
    scale,
    zero,
    inputs,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    SWAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):
    """acc and what one block of inputs adds: `values` points to words [outputs, words]; scale, zero: one an output.

    `inputs`: for each nibble of a word those that it multiplies, [rows, words].
    """
    packed = tl.load(values, eviction_policy="evict_first")
    weights = unpack_nibbles(packed, inputs[0].dtype, IS_COMPILED)
    part = zero_sums(ROWS, packed.shape[0], SWAPS)
    for nibble in tl.static_range(len(inputs)):
        weight = weights[nibble]
        if HAS_ZERO:
            weight -= zero.to(weight.dtype)[:, None]
        part = add_product(weight, inputs[nibble], part, SWAPS, PRECISION)
    return acc + part * by_output(scale.to(tl.float32), SWAPS)


@device_function
def _of_group(scale, zero, at, HAS_ZERO: tl.constexpr):
    """The scales of a block's outputs, and the zero points or the scales again."""
    own = tl.load(scale + at)
    if HAS_ZERO:
        return own, tl.load(zero + at)
    else:
        return own, own


@device_function
def _prefetch_scales(scale, first, end, stride, GROUP_BLOCKS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Those of a program's blocks, which `scale` points to the first output's of: [groups, outputs], `stride` apart.

    A turn looks ahead for those of the next alone: that hides the cache's latency, but not the memory's.
    """
    line: tl.constexpr = LINE_BYTES // (scale.dtype.element_ty.primitive_bitwidth // 8)
    count: tl.constexpr = (OUTPUTS + line - 1) // line
    lines = tl.arange(0, count)[None, :] * line
    for block in range(first, end, BLOCKS_AT_ONCE):
        groups = tl.minimum(block + tl.arange(0, BLOCKS_AT_ONCE), end - 1) // GROUP_BLOCKS
        prefetch(scale + groups.to(tl.int64)[:, None] * stride + lines)


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
    WORDS: tl.constexpr,
    NIBBLES: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SWAPS: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    BLOCKS_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    # the tiles of the same outputs follow each other
    begin = tl.program_id(0) // TILES * OUTPUTS
    columns = begin + tl.arange(0, OUTPUTS)
    rows = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, WORDS)
    turns = tl.cdiv(num_blocks, tl.num_programs(1))
    first = tl.program_id(1) * turns
    end = tl.minimum(first + turns, num_blocks)
    # outputs past the end, where there are any, read the last one again: no mask in the loop
    column = columns if IS_WHOLE else tl.minimum(columns, out_features - 1)
    all_outputs = out_features * 2 if GATED else out_features
    stride = all_outputs.to(tl.int64) * WORDS
    own = values + column[:, None] * WORDS
    if BLOCKS_AHEAD > 0:
        # the weights are older than any kernel under way: the first can come while it still runs
        line: tl.constexpr = LINE_BYTES // (values.dtype.element_ty.primitive_bitwidth // 8)
        begin = tl.minimum(begin, out_features - OUTPUTS)
        _prefetch_scales(scale + begin, first, end, all_outputs, GROUP_BLOCKS, OUTPUTS)
        if GATED:
            _prefetch_scales(scale + begin + out_features, first, end, all_outputs, GROUP_BLOCKS, OUTPUTS)
        if HAS_ZERO:
            _prefetch_scales(zero + begin, first, end, all_outputs, GROUP_BLOCKS, OUTPUTS)
            if GATED:
                _prefetch_scales(zero + begin + out_features, first, end, all_outputs, GROUP_BLOCKS, OUTPUTS)
        at = values + begin * WORDS
        blocks = tl.minimum(first + tl.arange(0, BLOCKS_AHEAD), end - 1)[:, None] * stride
        lines = tl.arange(0, OUTPUTS * WORDS // line)[None, :] * line
        prefetch(at + blocks + lines)
        if GATED:
            prefetch(at + out_features * WORDS + blocks + lines)
    wait_turn(PDL)
    x_at = x + rows[:, None] * x_stride + word[None, :]
    # rows past the end are not read: the same few lines, asked for by all programs at once, would hold them up
    is_row = (rows < num_rows)[:, None]
    acc = zero_sums(ROWS, OUTPUTS, SWAPS)
    up = zero_sums(ROWS, OUTPUTS, SWAPS)
    # scales are too small for the pipeline's asynchronous copies: each turn begins with the loads of the next one's
    at = first // GROUP_BLOCKS * all_outputs + column
    scales, zeros = _of_group(scale, zero, at, HAS_ZERO)
    up_scales, up_zeros = scales, zeros
    if GATED:
        up_scales, up_zeros = _of_group(scale, zero, at + out_features, HAS_ZERO)
    for block in range(first, end):
        at = tl.minimum(block + 1, end - 1) // GROUP_BLOCKS * all_outputs + column
        next_scales, next_zeros = _of_group(scale, zero, at, HAS_ZERO)
        packed = own + word[None, :] + block * stride
        inputs = load_inputs(x_at + block * (NIBBLES * WORDS), is_row, WORDS, NIBBLES)
        acc = _add_block(acc, packed, scales, zeros, inputs, HAS_ZERO, ROWS, SWAPS, PRECISION, IS_COMPILED)
        scales, zeros = next_scales, next_zeros
        if GATED:
            next_scales, next_zeros = _of_group(scale, zero, at + out_features, HAS_ZERO)
            packed += out_features * WORDS
            up = _add_block(up, packed, up_scales, up_zeros, inputs, HAS_ZERO, ROWS, SWAPS, PRECISION, IS_COMPILED)
            up_scales, up_zeros = next_scales, next_zeros
    if GATED:
        acc = gated(acc, up, x.dtype.element_ty)
    store_sums(out, acc, rows, columns, num_rows, out_features, SWAPS)


def int4_linear(x: torch.Tensor, weight: Int4Blocks, is_gated: bool, keeps_pieces: bool = False) -> torch.Tensor:
    """`kernels.quantized.int4_blocks_linear`."""
    num_rows = x.shape[0]
    if is_gated and num_rows > MAX_GATED_ROWS:
        return silu_mul(int4_linear(x, weight, False))
    if num_rows > MAX_ROWS:
        return torch.nn.functional.linear(x, int4_floats(weight, x.dtype))
    num_blocks, all_outputs, _ = weight.values.shape
    out_features = all_outputs // 2 if is_gated else all_outputs
    alone = row_config("row int4", x, out_features, is_gated) if weight.nibbles == 4 else None
    if alone is not None:
        return row_int4_product(x, weight, alone, is_gated)
    sliced = sliced_config("int4", x, out_features, is_gated) if weight.nibbles == 4 else None
    if sliced is not None:
        return sliced_int4_product(x, weight, sliced, is_gated)
    config = config_for("int4", x[:TILE_ROWS], out_features, num_blocks, is_gated)
    return int4_product(x, weight, config, is_gated, keeps_pieces)


def int4_product(
    x: torch.Tensor, weight: Int4Blocks, config: QuantizedConfig, is_gated: bool = False, keeps_pieces: bool = False
) -> torch.Tensor:
    """x [rows <= 256, in] times the transposed matrix; `is_gated` as in `gated_linear`, in one split.

    `keeps_pieces`: the result of several splits is float32 [splits, rows, out], which are still to be summed.
    """
    num_rows = x.shape[0]
    num_blocks, all_outputs, words = weight.values.shape
    out_features = all_outputs // 2 if is_gated else all_outputs
    out, target = result_and_target(x, out_features, config.splits)
    options = shared_options(x[:TILE_ROWS], config)
    tiles = triton.cdiv(num_rows, TILE_ROWS)
    grid = (tiles * triton.cdiv(out_features, config.outputs), config.splits)
    # a program's words of a block lie in a row; where it has fewer outputs than that it asks for none
    lines = lines_ahead(config.outputs * (2 if is_gated else 1), x.device) if out_features >= config.outputs else 0
    launch(_int4_kernel, grid)(
        x,
        weight.values,
        weight.scale,
        weight.zero if weight.zero is not None else weight.values,
        target,
        num_rows,
        out_features,
        num_blocks,
        x.stride(0),
        WORDS=words,
        NIBBLES=weight.nibbles,
        GROUP_BLOCKS=num_blocks // weight.scale.shape[0],
        HAS_ZERO=weight.zero is not None,
        IS_WHOLE=out_features % config.outputs == 0,
        TILES=tiles,
        OUTPUTS=config.outputs,
        GATED=is_gated,
        BLOCKS_AHEAD=lines * LINE_BYTES.value // (words * weight.values.element_size()),
        **options,
    )
    return target if config.splits == 1 or keeps_pieces else sum_splits(target, out)
