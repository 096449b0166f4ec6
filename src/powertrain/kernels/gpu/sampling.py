"""One token per row of logits, drawn on the device: greedy, or by temperature, top-k, top-p and min-p.

Four kernels, so that many processors share a row: each block's largest logit; the row's threshold, found by bisection
over the bits of a float instead of a sort; each block's mass above it; the draw, by inverting the cumulative sums at
one uniform number. The reductions of a row do not depend on its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powertrain.kernels.gpu.launch import launch_options, wait_turn

BLOCK = 4096


class Draws(NamedTuple):
    """How each row is drawn. All [rows].

    temperature: float32, 0 for greedy; uniform: float32 in [0, 1); top_p, min_p: float32, 1 and 0 for off; top_k:
    int32, 0 for off.
    """

    temperature: torch.Tensor
    uniform: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor


@triton.jit
def _order(value):
    """Integers that order as the floats do."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _largest_kernel(logits, largest, largest_at, num_logits, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_turn(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_logits
    value = tl.load(logits + row.to(tl.int64) * num_logits + columns, inside, other=float("-inf")).to(tl.float32)
    # a NaN or an infinity of either sign makes the block's largest NaN
    is_bad = inside & ((value - value) != 0.0)
    top = tl.max(value, 0)
    at = tl.min(tl.where(inside & (value == top), columns, num_logits), 0)
    top = tl.where(tl.max(is_bad.to(tl.int32), 0) > 0, float("nan"), top)
    tl.store(largest + row * tl.num_programs(1) + block, top)
    tl.store(largest_at + row * tl.num_programs(1) + block, at)


@triton.jit
def _measure(at, num_logits, key, top, inverse, BLOCK: tl.constexpr):
    """How many logits of a row reach `key`, and their mass relative to the largest."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_logits, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(at + columns, columns < num_logits, other=float("-inf")).to(tl.float32)
        stays = (_order(value) >= key) & (columns < num_logits)
        count += stays.to(tl.int32)
        mass += tl.where(stays, tl.exp((value - top) * inverse), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _threshold_kernel(
    logits,
    largest,
    top_of_row,
    threshold,
    temperature,
    top_p,
    min_p,
    top_k,
    num_logits,
    num_blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    row = tl.program_id(0)
    blocks = tl.arange(0, BLOCKS)
    tops = tl.load(largest + row * num_blocks + blocks, blocks < num_blocks, other=float("-inf"))
    is_bad = tl.max((tops != tops).to(tl.int32), 0) > 0
    top = tl.max(tl.where(tops == tops, tops, float("-inf")), 0)
    heat = tl.load(temperature + row)
    least = _order(float("-inf") + 0.0 * top)
    if (heat > 0.0) & (is_bad == 0):
        at = logits + row.to(tl.int64) * num_logits
        inverse = 1.0 / tl.maximum(heat, 1e-5)
        wanted = tl.load(top_k + row)
        share = tl.load(top_p + row)
        ceiling = _order(top)
        floor = tl.load(min_p + row)
        if floor > 0.0:  # before the others, which count what it leaves
            least = tl.maximum(least, _order(top + heat * tl.log(floor)))
        if (wanted > 0) & (wanted < num_logits):
            low, high = least.to(tl.int64), ceiling.to(tl.int64) + 1  # `low` keeps enough, `high` too few
            while high - low > 1:
                middle = (low + high) >> 1
                count, _ = _measure(at, num_logits, middle.to(tl.int32), top, inverse, BLOCK)
                enough = count >= wanted
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            least = low.to(tl.int32)
        if share < 1.0:
            _, all_mass = _measure(at, num_logits, least, top, inverse, BLOCK)
            low, high = least.to(tl.int64), ceiling.to(tl.int64) + 1
            while high - low > 1:
                middle = (low + high) >> 1
                _, mass = _measure(at, num_logits, middle.to(tl.int32), top, inverse, BLOCK)
                enough = mass >= share * all_mass
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            least = low.to(tl.int32)
    tl.store(threshold + row, least)
    tl.store(top_of_row + row, tl.where(is_bad, float("nan"), top))


@triton.jit
def _mass_kernel(
    logits, top_of_row, threshold, temperature, masses, num_logits, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    wait_turn(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    if heat > 0.0:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = columns < num_logits
        value = tl.load(logits + row.to(tl.int64) * num_logits + columns, inside, other=float("-inf")).to(tl.float32)
        weight = tl.exp((value - tl.load(top_of_row + row)) / tl.maximum(heat, 1e-5))
        weight = tl.where(inside & (_order(value) >= tl.load(threshold + row)), weight, 0.0)
        tl.store(masses + row * tl.num_programs(1) + block, tl.sum(weight, 0))


@triton.jit
def _draw_kernel(
    logits,
    largest,
    largest_at,
    top_of_row,
    threshold,
    temperature,
    uniform,
    masses,
    tokens,
    num_logits,
    num_blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    row = tl.program_id(0)
    blocks = tl.arange(0, BLOCKS)
    known = blocks < num_blocks
    top = tl.load(top_of_row + row)
    heat = tl.load(temperature + row)
    token = tl.full((), -1, tl.int32)
    if top == top:
        if heat > 0.0:
            sums = tl.cumsum(tl.load(masses + row * num_blocks + blocks, known, other=0.0), 0)
            total = tl.max(sums, 0)
            # a number that rounds up to the whole must not run past the last block with mass
            target = tl.minimum(tl.load(uniform + row), 0.99999994) * total
            chosen = tl.sum(((sums <= target) & known).to(tl.int32), 0)
            last = tl.sum(((sums < total) & known).to(tl.int32), 0)
            chosen = tl.minimum(chosen, last)
            before = tl.max(tl.where(blocks < chosen, sums, 0.0), 0)
            columns = chosen * BLOCK + tl.arange(0, BLOCK)
            inside = columns < num_logits
            at = logits + row.to(tl.int64) * num_logits + columns
            value = tl.load(at, inside, other=float("-inf")).to(tl.float32)
            stays = inside & (_order(value) >= tl.load(threshold + row))
            weight = tl.where(stays, tl.exp((value - top) / tl.maximum(heat, 1e-5)), 0.0)
            running = before + tl.cumsum(weight, 0)
            reached = stays & (running > target)
            first = tl.min(tl.where(reached, columns, num_logits), 0)
            final = tl.max(tl.where(stays, columns, 0), 0)
            token = tl.where(first < num_logits, first, final).to(tl.int32)
        else:
            tops = tl.load(largest + row * num_blocks + blocks, known, other=float("-inf"))
            places = tl.load(largest_at + row * num_blocks + blocks, known, other=0)
            token = tl.min(tl.where(known & (tops == top), places, num_logits), 0).to(tl.int32)
    tl.store(tokens + row, token.to(tl.int64))


def draw_tokens(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Tokens int64 [rows] of contiguous logits [rows, vocab]; -1 where a row holds a NaN or infinity.

    Greedy rows take the lowest id among equal logits; equal ones at the edge of top-k and top-p stay in.
    """
    num_rows, num_logits = logits.shape
    num_blocks = triton.cdiv(num_logits, BLOCK)
    device = logits.device
    numbers = torch.empty(2, num_rows, num_blocks, dtype=torch.float32, device=device)
    largest, masses = numbers.unbind()
    largest_at = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    top_of_row = torch.empty(num_rows, dtype=torch.float32, device=device)
    threshold = torch.empty(num_rows, dtype=torch.int32, device=device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    blocks = triton.next_power_of_2(num_blocks)
    options = launch_options(logits)
    _largest_kernel[(num_rows, num_blocks)](
        logits, largest, largest_at, num_logits, BLOCK=BLOCK, num_warps=8, **options
    )
    _threshold_kernel[(num_rows,)](
        logits,
        largest,
        top_of_row,
        threshold,
        draws.temperature,
        draws.top_p,
        draws.min_p,
        draws.top_k,
        num_logits,
        num_blocks,
        BLOCK=BLOCK,
        BLOCKS=blocks,
        num_warps=16,
        **options,
    )
    _mass_kernel[(num_rows, num_blocks)](
        logits, top_of_row, threshold, draws.temperature, masses, num_logits, BLOCK=BLOCK, num_warps=8, **options
    )
    _draw_kernel[(num_rows,)](
        logits,
        largest,
        largest_at,
        top_of_row,
        threshold,
        draws.temperature,
        draws.uniform,
        masses,
        tokens,
        num_logits,
        num_blocks,
        BLOCK=BLOCK,
        BLOCKS=blocks,
        num_warps=8,
        **options,
    )
    return tokens
