"""Triton products of few rows with a large matrix: the weights pass through once, at the speed of the memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powertrain.kernels.fused import silu_mul
from powertrain.kernels.gpu.activation import gated
from powertrain.kernels.gpu.launch import launch, launch_options, lines_ahead, prefetch_rows, wait_turn
from powertrain.kernels.gpu.quantized import matrix_product, tile_config
from powertrain.kernels.gpu.row_matmul import row_config, row_product
from powertrain.kernels.gpu.sliced_matmul import sliced_config, sliced_product
from powertrain.kernels.gpu.splits import sum_splits
from powertrain.kernels.gpu.tuned_table import measured
from powertrain.kernels.matmul import MAX_SKINNY_ROWS


class SkinnyConfig(NamedTuple):
    """Launch settings: outputs and inputs of one turn, pieces of the inputs that are summed apart, warps, stages."""

    outputs: int
    inputs: int
    splits: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_kernel(
    x,
    weight,
    out,
    num_rows,
    out_features,
    in_features,
    x_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    rows = tl.arange(0, ROWS)
    inputs = tl.arange(0, INPUTS)
    turns = tl.cdiv(tl.cdiv(in_features, INPUTS), SPLITS)
    first = tl.program_id(1) * turns * INPUTS
    end = tl.minimum(first + turns * INPUTS, in_features)
    # outputs past the end read the last one again: no mask in the loop
    own = weight + tl.minimum(columns, out_features - 1).to(tl.int64) * in_features
    half = out_features.to(tl.int64) * in_features
    if LINES > 0:
        # the weights are older than any kernel under way: the first can come while it still runs
        prefetch_rows(own, first, in_features, LINES)
        if GATED:
            prefetch_rows(own + half, first, in_features, LINES)
    wait_turn(PDL)
    w_at = own[:, None] + inputs[None, :]
    x_at = x + rows[:, None] * x_stride + inputs[None, :]
    # rows past the end are not read: the same few lines, asked for by all programs at once, would hold them up
    is_row = (rows < num_rows)[:, None]
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    up = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(first, end, INPUTS):
        if EVEN:
            w = tl.load(w_at + start, eviction_policy="evict_first")
            a = tl.load(x_at + start, is_row, other=0.0)
        else:
            inside = (start + inputs < end)[None, :]
            w = tl.load(w_at + start, inside, other=0.0, eviction_policy="evict_first")
            a = tl.load(x_at + start, inside & is_row, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
        if GATED:
            if EVEN:
                v = tl.load(w_at + half + start, eviction_policy="evict_first")
            else:
                v = tl.load(w_at + half + start, inside, other=0.0, eviction_policy="evict_first")
            up = tl.dot(a, tl.trans(v), up, input_precision=PRECISION)
    if GATED:
        acc = gated(acc, up, x.dtype.element_ty)
    to = out + (tl.program_id(1) * num_rows + rows)[:, None] * out_features + columns[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), (rows < num_rows)[:, None] & (columns < out_features)[None, :])


def dense_linear(x: torch.Tensor, weight: torch.Tensor, keeps_pieces: bool = False) -> torch.Tensor:
    """`kernels.matmul.dense_linear` for at most `MAX_SKINNY_ROWS` rows, or more where settings were measured."""
    alone = row_config("row dense_linear", x, weight.shape[0], False)
    if alone is not None:
        return row_product(x, weight, None, alone)
    sliced = sliced_config("dense_linear", x, weight.shape[0], False)
    if sliced is not None:
        return sliced_product(x, weight, sliced)
    tile = tile_config(x, weight.shape[0], is_gated=False)
    if tile is not None:
        return matrix_product(x, weight, None, tile, keeps_pieces=keeps_pieces)
    return skinny_linear(x, weight, config_for(x, weight.shape[0], gated=False), keeps_pieces=keeps_pieces)


def gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`kernels.matmul.gated_linear` for at most `MAX_SKINNY_ROWS` rows, or more where settings were measured."""
    alone = row_config("row dense_linear", x, weight.shape[0] // 2, True)
    if alone is not None:
        return row_product(x, weight, None, alone, True)
    sliced = sliced_config("dense_linear", x, weight.shape[0] // 2, True)
    if sliced is not None:
        return sliced_product(x, weight, sliced, True)
    tile = tile_config(x, weight.shape[0] // 2, is_gated=True)
    if tile is not None:
        return matrix_product(x, weight, None, tile, True)
    if x.shape[0] > MAX_SKINNY_ROWS:
        return silu_mul(dense_linear(x, weight))
    return skinny_linear(x, weight, config_for(x, weight.shape[0] // 2, gated=True), gated=True)


def config_for(x: torch.Tensor, out_features: int, *, gated: bool) -> SkinnyConfig:
    """The measured settings of the next larger number of rows, else a guess: enough programs, each with long runs."""
    num_rows, in_features = x.shape
    if x.dtype == torch.bfloat16:
        found = measured("dense_linear bfloat16", x.device, out_features, in_features, num_rows, gated)
        if found is not None:
            return SkinnyConfig(*(found[field] for field in SkinnyConfig._fields))
    inputs, stages = (64, 3) if x.element_size() == 4 else (128, 5)
    outputs = 16 if out_features < 512 else 32 if gated else 64
    splits = 1
    while not gated and splits < 4 and splits * out_features < 96 * outputs and in_features % (4 * inputs) == 0:
        splits *= 2
    return SkinnyConfig(outputs, inputs, splits, 4, stages)


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, config: SkinnyConfig, *, gated: bool = False, keeps_pieces: bool = False
) -> torch.Tensor:
    """x [rows <= 64, in] times the transposed weight [out, in], both contiguous along `in`; sums in float32.

    `gated`: the weight holds gate above up, and the result is silu(gate) * up [rows, out / 2], in one split.
    `keeps_pieces`: the result of several splits is float32 [splits, rows, out], which are still to be summed.
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0] // 2 if gated else weight.shape[0]
    splits = 1 if gated else config.splits
    out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    target = out
    if splits > 1:
        target = torch.empty(splits, num_rows, out_features, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(out_features, config.outputs), splits)
    launch(_skinny_kernel, grid)(
        x,
        weight,
        target,
        num_rows,
        out_features,
        in_features,
        x.stride(0),
        ROWS=max(16, triton.next_power_of_2(num_rows)),
        OUTPUTS=config.outputs,
        INPUTS=config.inputs,
        SPLITS=splits,
        EVEN=in_features % (config.inputs * splits) == 0,
        GATED=gated,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        LINES=lines_ahead(config.outputs * (2 if gated else 1), x.device),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x),
    )
    return target if splits == 1 or keeps_pieces else sum_splits(target, out)
