"""One token per row of logits, drawn on the device: greedy, or by temperature, top-k, top-p and min-p; with penalties.

Four kernels, so that many processors share a row: each block's largest logit; the row's threshold, found by bisection
over the bits of a float instead of a sort; each block's mass above it; the draw, by inverting the cumulative sums at
one uniform number. The reductions of a row do not depend on its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powertrain.kernels.gpu.launch import device_function, launch, launch_options, wait_turn

BLOCK = 4096


class Draws(NamedTuple):
    """How each row is drawn. All [rows].

    temperature: float32, 0 for greedy; uniform: float32 in [0, 1); top_p, min_p: float32, 1 and 0 for off; top_k:
    int64, 0 for off; repetition, presence, frequency: float32, the penalties, 1, 0 and 0 for off.
    """

    temperature: torch.Tensor
    uniform: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


class Seen(NamedTuple):
    """Which tokens each row's sequence holds, by slot.

    counts: int16 [slots, vocab], for penalties: how often the output has a token, in the low 15 bits, and whether the
    prompt has it, in the sign; rows without penalties may have any. slots: int64 [rows], each row's own. last_tokens:
    int64 [slots], which take what is drawn, or None.
    """

    counts: torch.Tensor
    slots: torch.Tensor
    last_tokens: torch.Tensor | None = None


_PENALTIES = ["slots", "repetition", "presence", "frequency"]
"""Parts of a step's tensors, as are other numbers of each row: where they begin depends on the number of rows, for
which nothing shall be compiled anew."""


@device_function
def _order(value):
    """Integers that order as the floats do."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@device_function
def _penalties(counts, slots, repetition, presence, frequency, num_logits):
    """A row's own counts and penalties, and whether it has any: what `_load` wants."""
    row = tl.program_id(0)
    own = counts + tl.load(slots + row) * num_logits
    factor = tl.load(repetition + row)
    once, each = tl.load(presence + row), tl.load(frequency + row)
    return own, factor, once, each, (factor != 1.0) | (once != 0.0) | (each != 0.0)


@device_function
def _load(logits, columns, num_logits, counts, factor, once, each, has_penalties):
    """Logits of a row as float32, penalized: Keskar et al. 2019 (arXiv 1909.05858), and the additive two."""
    inside = columns < num_logits
    value = tl.load(logits + columns, inside, other=float("-inf")).to(tl.float32)
    if has_penalties:
        seen = tl.load(counts + columns, inside, other=0).to(tl.int32)
        times = seen & 0x7FFF
        value = tl.where(seen != 0, tl.where(value > 0.0, value / factor, value * factor), value)
        value -= tl.where(times > 0, once + each * times.to(tl.float32), 0.0)
    return value


@triton.jit(do_not_specialize_on_alignment=_PENALTIES)
def _largest_kernel(
    logits,
    counts,
    slots,
    repetition,
    presence,
    frequency,
    largest,
    largest_at,
    num_logits,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_logits
    own, factor, once, each, has = _penalties(counts, slots, repetition, presence, frequency, num_logits)
    value = _load(logits + row.to(tl.int64) * num_logits, columns, num_logits, own, factor, once, each, has)
    # a NaN or an infinity of either sign makes the block's largest NaN
    is_bad = inside & ((value - value) != 0.0)
    top = tl.max(value, 0)
    at = tl.min(tl.where(inside & (value == top), columns, num_logits), 0)
    top = tl.where(tl.max(is_bad.to(tl.int32), 0) > 0, float("nan"), top)
    tl.store(largest + row * tl.num_programs(1) + block, top)
    tl.store(largest_at + row * tl.num_programs(1) + block, at)


@device_function
def _measure(at, num_logits, key, top, inverse, own, factor, once, each, has, BLOCK: tl.constexpr):
    """How many logits of a row reach `key`, and their mass relative to the largest."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_logits, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = _load(at, columns, num_logits, own, factor, once, each, has)
        stays = (_order(value) >= key) & (columns < num_logits)
        count += stays.to(tl.int32)
        mass += tl.where(stays, tl.exp((value - top) * inverse), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit(do_not_specialize_on_alignment=[*_PENALTIES, "temperature", "top_p", "min_p", "top_k"])
def _threshold_kernel(
    logits,
    counts,
    slots,
    repetition,
    presence,
    frequency,
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
    own, factor, once, each, has = _penalties(counts, slots, repetition, presence, frequency, num_logits)
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
                count, _ = _measure(
                    at, num_logits, middle.to(tl.int32), top, inverse, own, factor, once, each, has, BLOCK
                )
                enough = count >= wanted
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            least = low.to(tl.int32)
        if share < 1.0:
            _, all_mass = _measure(at, num_logits, least, top, inverse, own, factor, once, each, has, BLOCK)
            low, high = least.to(tl.int64), ceiling.to(tl.int64) + 1
            while high - low > 1:
                middle = (low + high) >> 1
                _, mass = _measure(
                    at, num_logits, middle.to(tl.int32), top, inverse, own, factor, once, each, has, BLOCK
                )
                enough = mass >= share * all_mass
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
            least = low.to(tl.int32)
    tl.store(threshold + row, least)
    tl.store(top_of_row + row, tl.where(is_bad, float("nan"), top))


@triton.jit(do_not_specialize_on_alignment=[*_PENALTIES, "temperature", "masses"])
def _mass_kernel(
    logits,
    counts,
    slots,
    repetition,
    presence,
    frequency,
    top_of_row,
    threshold,
    temperature,
    masses,
    num_logits,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    if heat > 0.0:
        columns = block * BLOCK + tl.arange(0, BLOCK)
        inside = columns < num_logits
        own, factor, once, each, has = _penalties(counts, slots, repetition, presence, frequency, num_logits)
        value = _load(logits + row.to(tl.int64) * num_logits, columns, num_logits, own, factor, once, each, has)
        weight = tl.exp((value - tl.load(top_of_row + row)) / tl.maximum(heat, 1e-5))
        weight = tl.where(inside & (_order(value) >= tl.load(threshold + row)), weight, 0.0)
        tl.store(masses + row * tl.num_programs(1) + block, tl.sum(weight, 0))


@triton.jit(do_not_specialize_on_alignment=[*_PENALTIES, "temperature", "uniform", "masses"])
def _draw_kernel(
    logits,
    counts,
    slots,
    repetition,
    presence,
    frequency,
    largest,
    largest_at,
    top_of_row,
    threshold,
    temperature,
    uniform,
    masses,
    tokens,
    last_tokens,
    num_logits,
    num_blocks,
    HAS_LAST: tl.constexpr,
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
            own, factor, once, each, has = _penalties(counts, slots, repetition, presence, frequency, num_logits)
            at = logits + row.to(tl.int64) * num_logits
            value = _load(at, columns, num_logits, own, factor, once, each, has)
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
    if HAS_LAST:
        tl.store(last_tokens + tl.load(slots + row), token.to(tl.int64))
    if token >= 0:
        own_count = counts + tl.load(slots + row) * num_logits + token
        times = tl.load(own_count)
        tl.store(own_count, tl.where((times & 0x7FFF) == 0x7FFF, times, times + 1))


def draw_tokens(logits: torch.Tensor, draws: Draws, seen: Seen) -> torch.Tensor:
    """Tokens int64 [rows] of contiguous logits [rows, vocab], counted in `seen`; -1 where a row is not finite.

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
    penalized = (logits, seen.counts, seen.slots, draws.repetition, draws.presence, draws.frequency)
    launch(_largest_kernel, (num_rows, num_blocks))(
        *penalized, largest, largest_at, num_logits, BLOCK=BLOCK, num_warps=8, **options
    )
    launch(_threshold_kernel, (num_rows,))(
        *penalized,
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
    launch(_mass_kernel, (num_rows, num_blocks))(
        *penalized, top_of_row, threshold, draws.temperature, masses, num_logits, BLOCK=BLOCK, num_warps=8, **options
    )
    launch(_draw_kernel, (num_rows,))(
        *penalized,
        largest,
        largest_at,
        top_of_row,
        threshold,
        draws.temperature,
        draws.uniform,
        masses,
        tokens,
        seen.last_tokens if seen.last_tokens is not None else tokens,
        num_logits,
        num_blocks,
        HAS_LAST=seen.last_tokens is not None,
        BLOCK=BLOCK,
        BLOCKS=blocks,
        num_warps=8,
        **options,
    )
    return tokens
