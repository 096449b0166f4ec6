"""GGUF's K types: super-blocks of 256 weights, whose sub-blocks have integer scales under one float16 scale.

Fitted by alternating least squares on the squared error of the weights. First each sub-block by itself: several grids
are tried, and for the integers that each gives, the best scale (and minimum) is solved for. Then the scales of a
super-block are rounded to integers together, and three things take turns: the neighbours of each integer scale are
tried with the weights rounded anew, and the float16 scales are solved for. What had the least error is kept, and plain
rounding is where it starts, so that no super-block is worse than that.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

NUM_ROUNDS = 3
STRETCHES = tuple(step / 10 for step in range(-9, 10))
"""Levels by which a grid tried for a sub-block is finer or coarser than the range of its weights."""


def _half(values: Tensor) -> Tensor:
    """Rounded to float16, as it is stored."""
    return values.to(torch.float16).float()


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0 or so small that the quotient is not finite."""
    return torch.nan_to_num(numerator / denominator, nan=0.0, posinf=0.0, neginf=0.0)


def _bytes(values: Tensor) -> Tensor:
    return values.to(torch.float16).view(-1, 1).view(torch.uint8)


# ---- types without minima: weight = d * scale * value ----


def _rounded(weights: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return _ratio(weights, scale).round_().clamp_(low, high)


def _fit_scales(weights: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """weights [n, subs, size] -> two scales [n, subs, 1]: plain (largest number on the lowest level), and best."""
    largest = weights.abs().argmax(-1, keepdim=True)
    extreme = weights.gather(-1, largest)
    plain = extreme / low
    best, best_gain = plain.clone(), torch.full_like(plain, -1.0)
    for end, stretch in product((low, high), STRETCHES):
        values = _rounded(weights, extreme / (end + stretch), low, high)
        dot, square = (weights * values).sum(-1, keepdim=True), (values * values).sum(-1, keepdim=True)
        gain = _ratio(dot * dot, square)
        is_better = gain > best_gain
        best = torch.where(is_better, _ratio(dot, square), best)
        best_gain = torch.where(is_better, gain, best_gain)
    return plain, best


def _settle_scales(
    weights: Tensor, scales: Tensor, levels: tuple[int, int], limits: tuple[int, int], num_rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(error [n], d [n, 1, 1], integer scales [n, subs, 1], values) after so many rounds from these scales."""
    low, high = levels
    largest = scales.abs().argmax(1, keepdim=True)
    d = _half(scales.gather(1, largest) / limits[0])
    whole = _rounded(scales, d, *limits)
    found: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for number in range(num_rounds + 1):
        if number:
            part = whole * _rounded(weights, d * whole, low, high)
            d = _half(_ratio((weights * part).sum((1, 2), keepdim=True), (part * part).sum((1, 2), keepdim=True)))
            whole = _best_neighbour(weights, d, whole, levels, limits)
        values = _rounded(weights, d * whole, low, high)
        error = (weights - d * whole * values).square().sum((1, 2))
        state = (error, d, whole, values)
        found = state if found is None else _better(found, state)
    assert found is not None
    return found


def _best_neighbour(
    weights: Tensor, d: Tensor, whole: Tensor, levels: tuple[int, int], limits: tuple[int, int]
) -> Tensor:
    best, best_error = whole, torch.full_like(whole, torch.inf)
    for shift in (0, -1, 1):
        tried = (whole + shift).clamp(*limits)
        scale = d * tried
        error = (weights - scale * _rounded(weights, scale, *levels)).square().sum(-1, keepdim=True)
        best = torch.where(error < best_error, tried, best)
        best_error = torch.minimum(error, best_error)
    return best


def _better(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each super-block the state with less error; the first of each state is the error [n]."""
    is_better = other[0] < one[0]
    kept = [
        torch.where(is_better.view(-1, *[1] * (old.dim() - 1)), new, old) for old, new in zip(one, other, strict=True)
    ]
    return kept[0], kept[1], kept[2], kept[3]


def _fit_symmetric(
    blocks: Tensor, levels: tuple[int, int], limits: tuple[int, int], is_plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Super-blocks [n, 256] in 16 sub-blocks -> (d [n, 1, 1], integer scales [n, 16, 1], values [n, 16, 16])."""
    weights = blocks.view(-1, 16, 16)
    plain, best = _fit_scales(weights, *levels)
    settled = _settle_scales(weights, plain, levels, limits, 0)
    if not is_plain:
        settled = _better(settled, _settle_scales(weights, best, levels, limits, NUM_ROUNDS))
    return settled[1], settled[2], settled[3]


# ---- types with minima: weight = d * scale * value - dmin * minimum ----


def _raised(weights: Tensor, scale: Tensor, minimum: Tensor, high: int) -> Tensor:
    return _ratio(weights + minimum, scale).round_().clamp_(0, high)


def _fit_ranges(weights: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """weights [n, subs, size] -> (scale, minimum), each [2, n, subs, 1] and not negative: the plain and the best."""
    size = weights.shape[-1]
    floor = weights.amin(-1, keepdim=True).clamp(max=0)
    span = weights.amax(-1, keepdim=True) - floor
    total = weights.sum(-1, keepdim=True)
    best_scale, best_minimum = span / high, -floor
    best_error = torch.full_like(span, torch.inf)
    for stretch in (0.0, *STRETCHES):
        values = _ratio((weights - floor) * (high + stretch), span).round_().clamp_(0, high)
        sum_1, sum_2 = values.sum(-1, keepdim=True), (values * values).sum(-1, keepdim=True)
        dot = (weights * values).sum(-1, keepdim=True)
        scale = _ratio(size * dot - sum_1 * total, size * sum_2 - sum_1 * sum_1)
        minimum = (scale * sum_1 - total) / size
        is_free = (minimum >= 0) & (scale > 0)
        scale = torch.where(is_free, scale, _ratio(dot, sum_2).clamp(min=0))
        minimum = torch.where(is_free, minimum, torch.zeros_like(minimum))
        error = (weights + minimum - scale * values).square().sum(-1, keepdim=True)
        is_better = error < best_error
        best_scale, best_minimum = (
            torch.where(is_better, scale, best_scale),
            torch.where(is_better, minimum, best_minimum),
        )
        best_error = torch.minimum(error, best_error)
    return torch.stack((span / high, best_scale)), torch.stack((-floor, best_minimum))


def _settle_ranges(
    weights: Tensor, scales: Tensor, minima: Tensor, high: int, limit: int, num_rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(error [n], d and dmin [n, 1, 2], integer scales and minima [n, subs, 2], values) after so many rounds."""
    halves = _half(torch.cat((scales, minima), dim=-1).amax(1, keepdim=True) / limit)
    d, dmin = halves.chunk(2, dim=-1)
    whole, lifts = _ratio(scales, d).round().clamp(0, limit), _ratio(minima, dmin).round().clamp(0, limit)
    found: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for number in range(num_rounds + 1):
        if number:
            values = _raised(weights, d * whole, dmin * lifts, high)
            d, dmin = _solve_halves(weights, whole * values, lifts.expand_as(values), d, dmin)
            whole, lifts = _best_pair(weights, (d, dmin), (whole, lifts), high, limit)
        values = _raised(weights, d * whole, dmin * lifts, high)
        error = (weights - (d * whole * values - dmin * lifts)).square().sum((1, 2))
        state = (error, torch.cat((d, dmin), dim=-1), torch.cat((whole, lifts), dim=-1), values)
        found = state if found is None else _better(found, state)
    assert found is not None
    return found


def _solve_halves(weights: Tensor, up: Tensor, down: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """The d and dmin that make `d * up - dmin * down` nearest to the weights; the old ones where none are positive."""

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum((1, 2), keepdim=True)

    uu, ud, dd, wu, wd = dot(up, up), dot(up, down), dot(down, down), dot(weights, up), dot(weights, down)
    determinant = uu * dd - ud * ud
    new_d, new_dmin = _ratio(wu * dd - wd * ud, determinant), _ratio(wu * ud - wd * uu, determinant)
    is_solved = (new_d > 0) & (new_dmin >= 0) & (determinant > 1e-6 * uu * dd)
    return _half(torch.where(is_solved, new_d, d)), _half(torch.where(is_solved, new_dmin, dmin))


def _best_pair(
    weights: Tensor, halves: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor], high: int, limit: int
) -> tuple[Tensor, Tensor]:
    """The integer scale and minimum of each sub-block, or their neighbours, whichever round the weights best."""
    best = whole
    best_error = torch.full_like(whole[0], torch.inf)
    for shift in product((0, -1, 1), repeat=2):
        tried = [(old + step).clamp(0, limit) for old, step in zip(whole, shift, strict=True)]
        scale, minimum = halves[0] * tried[0], halves[1] * tried[1]
        values = _raised(weights, scale, minimum, high)
        error = (weights - (scale * values - minimum)).square().sum(-1, keepdim=True)
        is_better = error < best_error
        best = (torch.where(is_better, tried[0], best[0]), torch.where(is_better, tried[1], best[1]))
        best_error = torch.minimum(error, best_error)
    return best


def _fit_affine(
    blocks: Tensor, sub_size: int, high: int, limit: int, is_plain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d and dmin [n, 1, 2], integer scales uint8 [n, subs], integer minima uint8 [n, subs], values uint8 [n, 256])."""
    weights = blocks.view(-1, 256 // sub_size, sub_size)
    scales, minima = _fit_ranges(weights, high)
    settled = _settle_ranges(weights, scales[0], minima[0], high, limit, 0)
    if not is_plain:
        settled = _better(settled, _settle_ranges(weights, scales[1], minima[1], high, limit, NUM_ROUNDS))
    whole = settled[2].to(torch.uint8)
    return settled[1], whole[..., 0], whole[..., 1], settled[3].to(torch.uint8).flatten(1)


# ---- bytes ----


def _pack_pairs_of_bits(values: Tensor) -> Tensor:
    """uint8 [n, 256] of 0 to 3 -> [n, 64]: one weight of each of four runs of 32 in a byte."""
    runs = values.view(-1, 2, 4, 32)
    return (runs[:, :, 0] | (runs[:, :, 1] << 2) | (runs[:, :, 2] << 4) | (runs[:, :, 3] << 6)).flatten(1)


def _pack_bit_planes(bits: Tensor) -> Tensor:
    """uint8 [n, 256] of 0 or 1 -> [n, 32]: bit i of byte j is weight j of run i of 32."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device).view(1, 8, 1)
    return (bits.view(-1, 8, 32) << shifts).sum(1, dtype=torch.uint8)


def _pack_nibbles(values: Tensor, run: int) -> Tensor:
    """uint8 [n, 256] of 0 to 15 -> [n, 128]: of each two runs of `run` the first in the low bits."""
    runs = values.view(-1, 128 // run, 2, run)
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).flatten(1)


def _pack_sub_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight 6-bit scales and minima, uint8 [n, 8] each, in 12 bytes: the inverse of `gguf_blocks._sub_scales`."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    return torch.cat((first, second, (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)), dim=1)


def _q2_k(blocks: Tensor, is_plain: bool = False) -> Tensor:
    halves, scales, minima, values = _fit_affine(blocks, 16, 3, 15, is_plain)
    d, dmin = halves.unbind(-1)
    return torch.cat((scales | (minima << 4), _pack_pairs_of_bits(values), _bytes(d), _bytes(dmin)), dim=1)


def _q3_k(blocks: Tensor, is_plain: bool = False) -> Tensor:
    d, scales, values = _fit_symmetric(blocks, (-4, 3), (-32, 31), is_plain)
    raised = (values + 4).to(torch.uint8).flatten(1)
    whole = (scales + 32).to(torch.uint8).flatten(1)
    nibbles = (whole[:, :8] & 15) | ((whole[:, 8:] & 15) << 4)
    top = (whole >> 4).view(-1, 4, 4)
    tops = top[:, 0] | (top[:, 1] << 2) | (top[:, 2] << 4) | (top[:, 3] << 6)
    return torch.cat((_pack_bit_planes(raised >> 2), _pack_pairs_of_bits(raised & 3), nibbles, tops, _bytes(d)), dim=1)


def _q4_k(blocks: Tensor, is_plain: bool = False) -> Tensor:
    halves, scales, minima, values = _fit_affine(blocks, 32, 15, 63, is_plain)
    d, dmin = halves.unbind(-1)
    return torch.cat((_bytes(d), _bytes(dmin), _pack_sub_scales(scales, minima), _pack_nibbles(values, 32)), dim=1)


def _q5_k(blocks: Tensor, is_plain: bool = False) -> Tensor:
    halves, scales, minima, values = _fit_affine(blocks, 32, 31, 63, is_plain)
    d, dmin = halves.unbind(-1)
    parts = (_pack_sub_scales(scales, minima), _pack_bit_planes(values >> 4), _pack_nibbles(values & 15, 32))
    return torch.cat((_bytes(d), _bytes(dmin), *parts), dim=1)


def _q6_k(blocks: Tensor, is_plain: bool = False) -> Tensor:
    d, scales, values = _fit_symmetric(blocks, (-32, 31), (-128, 127), is_plain)
    raised = (values + 32).to(torch.uint8).flatten(1)
    whole = scales.flatten(1).to(torch.int8).view(torch.uint8)
    return torch.cat((_pack_nibbles(raised & 15, 64), _pack_pairs_of_bits(raised >> 4), whole, _bytes(d)), dim=1)


K_ENCODERS: dict[str, Callable[..., Tensor]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""Type name -> encoder of float32 [n, 256] to uint8 [n, bytes]; `is_plain` rounds without any search."""
