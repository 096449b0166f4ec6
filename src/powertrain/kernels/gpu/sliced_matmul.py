"""Triton products of few rows whose inputs are cut into slices, one a warp: each warp sums its own on the tensor cores.

A program of few outputs reads long runs of each row, and many programs fit on a processor: that keeps more of the
memory's bytes on their way than tiles of many outputs do, and no pieces are left to be summed in memory. The slices of
a turn lie side by side; a product of stacked matrices gives each warp its own, and the sums meet once, at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from powertrain.kernels.gpu.activation import gated
from powertrain.kernels.gpu.conversions import unpack_nibbles
from powertrain.kernels.gpu.launch import device_function, launch, launch_options, lines_ahead, prefetch_rows, wait_turn
from powertrain.kernels.gpu.tuned_table import measured
from powertrain.kernels.quantized import Int4Blocks


class SlicedConfig(NamedTuple):
    """Launch settings: outputs of a program, slices (and warps), inputs of a slice in one turn, stages."""

    outputs: int
    slices: int
    inputs: int
    num_stages: int


@device_function
def _load(at, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, inside, other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_rows"])
def _sliced_kernel(
    x,
    weight,
    out,
    num_rows,
    out_features,
    in_features,
    x_stride,
    EVEN: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SLICES: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.minimum(columns, out_features - 1)
    inputs = (tl.arange(0, SLICES) * INPUTS)[:, None, None] + tl.arange(0, INPUTS)[None, None, :]
    own = weight + column.to(tl.int64) * in_features
    half = out_features.to(tl.int64) * in_features
    if LINES > 0:
        # the weights are older than any kernel under way: the first can come while it still runs
        prefetch_rows(own, 0, in_features, LINES)
        if GATED:
            prefetch_rows(own + half, 0, in_features, LINES)
    wait_turn(PDL)
    rows = tl.arange(0, ROWS)
    x_at = x + rows[None, :, None] * x_stride + inputs
    # rows past the end are not read: the same few lines, asked for by all programs at once, would hold them up
    is_row = (rows < num_rows)[None, :, None]
    at = own[None, :, None] + inputs
    # the rows are those of the tensor cores' tiles: a program may then have 8 outputs
    acc = tl.zeros((SLICES, ROWS, OUTPUTS), tl.float32)
    up = tl.zeros((SLICES, ROWS, OUTPUTS), tl.float32)
    for start in tl.range(0, in_features, SLICES * INPUTS, num_stages=STAGES):
        inside = inputs + start < in_features
        a = tl.load(x_at + start, is_row if EVEN else is_row & inside, other=0.0)
        acc = tl.dot(a, tl.trans(_load(at + start, inside, EVEN), 0, 2, 1), acc)
        if GATED:
            up = tl.dot(a, tl.trans(_load(at + half + start, inside, EVEN), 0, 2, 1), up)
    total = tl.sum(acc, 0)
    if GATED:
        total = gated(total, tl.sum(up, 0), x.dtype.element_ty)
    inside = (rows < num_rows)[:, None] & (columns < out_features)[None, :]
    tl.store(out + rows[:, None] * out_features + columns[None, :], total.to(out.dtype.element_ty), inside)


@device_function
def load_inputs(x, is_row, WORDS: tl.constexpr, NIBBLES: tl.constexpr):
    """The inputs of a block, which `x` points to the first word's of, by the nibble that they multiply."""
    if NIBBLES == 4:
        return (
            tl.load(x, is_row, other=0.0),
            tl.load(x + WORDS, is_row, other=0.0),
            tl.load(x + 2 * WORDS, is_row, other=0.0),
            tl.load(x + 3 * WORDS, is_row, other=0.0),
        )
    else:
        return tl.load(x, is_row, other=0.0), tl.load(x + WORDS, is_row, other=0.0)


@device_function
def _of_groups(scale, zero, block, num_blocks, outputs, GROUP_BLOCKS: tl.constexpr, HAS_ZERO: tl.constexpr):
    """The scales of a turn's blocks [slices, outputs], and the zero points or the scales again.

    `scale` and `zero` point to the first group's; past the end come the last.
    """
    at = (tl.minimum(block, num_blocks - 1) // GROUP_BLOCKS * outputs)[:, None]
    own = tl.load(scale[None, :] + at)
    if HAS_ZERO:
        return own, tl.load(zero[None, :] + at)
    else:
        return own, own


@device_function
def _add_blocks(acc, packed, scale, zero, inputs, HAS_ZERO: tl.constexpr, IS_COMPILED: tl.constexpr):
    """acc [slices, outputs, rows] and what a block a slice adds; `inputs`: what each nibble of a word multiplies."""
    weights = unpack_nibbles(packed, inputs[0].dtype, IS_COMPILED)
    part = tl.zeros(acc.shape, tl.float32)
    for nibble in tl.static_range(len(inputs)):
        weight = weights[nibble]
        if HAS_ZERO:
            weight -= zero.to(weight.dtype)[:, :, None]
        part = tl.dot(weight, tl.trans(inputs[nibble], 0, 2, 1), part)
    return acc + part * scale.to(tl.float32)[:, :, None]


@triton.jit(do_not_specialize=["num_rows"])
def _sliced_int4_kernel(
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
    EVEN: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.minimum(columns, out_features - 1)
    slices, word = tl.arange(0, SLICES), tl.arange(0, WORDS)
    all_outputs = out_features * 2 if GATED else out_features
    stride = all_outputs.to(tl.int64) * WORDS
    at = (slices * stride)[:, None, None] + (column[:, None] * WORDS + word[None, :])[None, :, :]
    own_scale, own_zero = scale + column, zero + column
    up_scale, up_zero = own_scale + out_features, own_zero + out_features
    # older than any kernel under way: these can come while it still runs
    scales, zeros = _of_groups(own_scale, own_zero, slices, num_blocks, all_outputs, GROUP_BLOCKS, HAS_ZERO)
    up_scales, up_zeros = scales, zeros
    if GATED:
        up_scales, up_zeros = _of_groups(up_scale, up_zero, slices, num_blocks, all_outputs, GROUP_BLOCKS, HAS_ZERO)
    wait_turn(PDL)
    rows = tl.arange(0, ROWS)
    x_at = x + rows[None, :, None] * x_stride + (slices * (NIBBLES * WORDS))[:, None, None] + word[None, None, :]
    # rows past the end are not read: the same few lines, asked for by all programs at once, would hold them up
    is_row = (rows < num_rows)[None, :, None]
    # the outputs are those of the tensor cores' tiles, and 8 rows fill their other side: unpacked once, used whole
    acc = tl.zeros((SLICES, OUTPUTS, ROWS), tl.float32)
    up = tl.zeros((SLICES, OUTPUTS, ROWS), tl.float32)
    for first in tl.range(0, num_blocks, SLICES, num_stages=STAGES):
        block = first + slices
        is_block = block < num_blocks
        # scales are too small for the pipeline's asynchronous copies: each turn begins with the loads of the next one's
        ahead = block + SLICES
        next_scales, next_zeros = _of_groups(
            own_scale, own_zero, ahead, num_blocks, all_outputs, GROUP_BLOCKS, HAS_ZERO
        )
        next_up_scales, next_up_zeros = next_scales, next_zeros
        if GATED:
            next_up_scales, next_up_zeros = _of_groups(
                up_scale, up_zero, ahead, num_blocks, all_outputs, GROUP_BLOCKS, HAS_ZERO
            )
        mask = is_row if EVEN else is_row & is_block[:, None, None]
        inputs = load_inputs(x_at + first * (NIBBLES * WORDS), mask, WORDS, NIBBLES)
        own = values + first * stride
        packed = _load(own + at, is_block[:, None, None], EVEN)
        acc = _add_blocks(acc, packed, scales, zeros, inputs, HAS_ZERO, IS_COMPILED)
        if GATED:
            packed = _load(own + out_features * WORDS + at, is_block[:, None, None], EVEN)
            up = _add_blocks(up, packed, up_scales, up_zeros, inputs, HAS_ZERO, IS_COMPILED)
        scales, zeros, up_scales, up_zeros = next_scales, next_zeros, next_up_scales, next_up_zeros
    total = tl.sum(acc, 0)
    if GATED:
        total = gated(total, tl.sum(up, 0), x.dtype.element_ty)
    inside = (rows < num_rows)[None, :] & (columns < out_features)[:, None]
    tl.store(out + rows[None, :] * out_features + columns[:, None], total.to(out.dtype.element_ty), inside)


def sliced_config(product: str, x: torch.Tensor, out_features: int, is_gated: bool) -> SlicedConfig | None:
    """The measured settings of `product` ("int4", say); None where there are none or another product was faster."""
    if x.dtype != torch.bfloat16:
        return None
    found = measured(f"sliced {product} bfloat16", x.device, out_features, x.shape[1], x.shape[0], is_gated)
    return None if found is None else SlicedConfig(*(found[field] for field in SlicedConfig._fields))


def sliced_product(x: torch.Tensor, weight: torch.Tensor, config: SlicedConfig, is_gated: bool = False) -> torch.Tensor:
    """x [rows <= 64, in] times the transposed weight [out, in], 16-bit floats, contiguous.

    `is_gated` as in `gated_linear`. Sums in float32.
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0] // 2 if is_gated else weight.shape[0]
    out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    launch(_sliced_kernel, (triton.cdiv(out_features, config.outputs),))(
        x,
        weight,
        out,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        EVEN=in_features % (config.slices * config.inputs) == 0,
        ROWS=max(16, triton.next_power_of_2(num_rows)),
        INPUTS=config.inputs,
        LINES=lines_ahead(config.outputs * (2 if is_gated else 1), x.device),
        **_options(x, config, is_gated),
    )
    return out


def sliced_int4_product(
    x: torch.Tensor, weight: Int4Blocks, config: SlicedConfig, is_gated: bool = False
) -> torch.Tensor:
    """x [rows <= 64, in] times the transposed matrix, a block a slice; as `sliced_product`."""
    num_blocks, all_outputs, words = weight.values.shape
    out_features = all_outputs // 2 if is_gated else all_outputs
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    launch(_sliced_int4_kernel, (triton.cdiv(out_features, config.outputs),))(
        x,
        weight.values,
        weight.scale,
        weight.zero if weight.zero is not None else weight.values,
        out,
        x.shape[0],
        out_features,
        num_blocks,
        x.stride(0),
        WORDS=words,
        NIBBLES=weight.nibbles,
        GROUP_BLOCKS=num_blocks // weight.scale.shape[0],
        HAS_ZERO=weight.zero is not None,
        EVEN=num_blocks % config.slices == 0,
        ROWS=max(8, triton.next_power_of_2(x.shape[0])),
        IS_COMPILED=x.is_cuda,
        **_options(x, config, is_gated),
    )
    return out


def _options(x: torch.Tensor, config: SlicedConfig, is_gated: bool) -> dict[str, Any]:
    return {
        "GATED": is_gated,
        "OUTPUTS": config.outputs,
        "SLICES": config.slices,
        "STAGES": config.num_stages,
        "num_warps": config.slices,
        **launch_options(x),
    }
