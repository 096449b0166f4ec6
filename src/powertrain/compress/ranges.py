"""Which range of weights the grid of a group spans: its scale and zero point, and the integers they give."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from powertrain.types import PowertrainError

Observer: TypeAlias = Literal["minmax", "mse", "weighted"]
OBSERVERS: tuple[Observer, ...] = ("minmax", "mse", "weighted")

ERROR_POWER = 2.4
"""The search minimises sum |w - w'|^p. 2.4 is the field's: GPTQ's code and llm-compressor's `mse` observer have it, so
results can be compared. It was not fitted here; above 2, the few large errors that clipping makes weigh more."""

SHRINK_STEPS = 50
"""The search tries 1, 0.99, ... 0.5 of the whole range. Gaussian groups of 64 want 0.65 to 0.7 of it at 2 bits and 0.95
at 4; a tenth of groups with heavy tails would go below a half at 2 bits."""

CHUNK_WEIGHTS = 1 << 14
"""Weights searched at a time. Temporaries stay in a core's cache, and torch does not wake its threads for so few:
beside other work they wait on each other up to ten times as long as they compute."""

GPU_CHUNK_WEIGHTS = 1 << 24
"""On a GPU a launch costs more than the work on few weights."""


def choose_range(
    groups: Tensor,
    num_bits: int,
    symmetric: bool,
    observer: Observer,
    scale_dtype: torch.dtype,
    name: str,
    shrink_steps: int = SHRINK_STEPS,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The grid of each group: (scale, zero point), float32 [...], for `groups` float32 [..., g] that share one each.

    The range of `minmax` is that of the group, widened to hold zero; `mse` takes the part of it, from all down to half,
    that leaves the least sum |w - w'|^2.4 of `shrink_steps` tried; `weighted` weighs that sum by `importance`, float32
    [groups of a row, g], where it is given: only who knows the inputs can. Symmetric: the scale is the largest size in
    the range over (2^b - 1) / 2, and there is no zero point. Asymmetric: its length over 2^b - 1, and the zero point is
    an integer in [-2^(b-1), 2^(b-1) - 1]. Scales are values of `scale_dtype`, rounded to it before anything is derived
    from them, and never zero. Raises `PowertrainError` naming `name` for NaN, infinity or a scale beyond `scale_dtype`.
    """
    low = groups.amin(dim=-1).clamp(max=0.0)
    high = groups.amax(dim=-1).clamp(min=0.0)
    if not bool(torch.isfinite(high - low).all()):
        raise PowertrainError(f"{name}: holds NaN or infinity, so no grid fits it; the source file is damaged")
    scale, zero_point = _grid(low, high, num_bits, symmetric, scale_dtype, name)
    if observer != "minmax":
        size = groups.shape[-1]
        at_once = CHUNK_WEIGHTS if groups.device.type == "cpu" else GPU_CHUNK_WEIGHTS
        flat, step = groups.reshape(-1, size), max(1, at_once // size)
        shares = 1.0 - 0.5 * torch.arange(shrink_steps + 1, device=groups.device).unsqueeze(1) / shrink_steps
        lows, highs, scales = low.flatten(), high.flatten(), scale.flatten()
        zeros = None if zero_point is None else zero_point.flatten()
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            ends = lows[part] * shares, highs[part] * shares
            own = None
            if importance is not None and observer == "weighted":
                own = importance[torch.arange(start, start + len(flat[part]), device=groups.device) % len(importance)]
            scales[part], found = _search(flat[part], ends, num_bits, symmetric, scale_dtype, name, own)
            if zeros is not None and found is not None:
                zeros[part] = found
        scale, zero_point = scales.view_as(low), None if zeros is None else zeros.view_as(low)
    return scale, zero_point


def to_integers(groups: Tensor, scale: Tensor, zero_point: Tensor | None, num_bits: int) -> Tensor:
    """The nearest integers of the grid, float32 [..., g], of what `choose_range` gave for `groups` [..., g]."""
    return torch.round(_positions(groups, scale, zero_point)).clamp_(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)


def _positions(groups: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Where the weights lie on the grid, in steps."""
    steps = groups / scale.unsqueeze(-1)
    return steps if zero_point is None else steps.add_(zero_point.unsqueeze(-1))


def _grid(
    low: Tensor, high: Tensor, num_bits: int, symmetric: bool, scale_dtype: torch.dtype, name: str
) -> tuple[Tensor, Tensor | None]:
    q_min, q_max = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    if symmetric:
        return _storable(torch.maximum(-low, high) / ((q_max - q_min) / 2), scale_dtype, name), None
    scale = _storable((high - low) / (q_max - q_min), scale_dtype, name)
    return scale, torch.round(q_min - low / scale).clamp(q_min, q_max)


def _search(
    groups: Tensor,
    ends: tuple[Tensor, Tensor],
    num_bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    name: str,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The best grid of each of `groups` [n, g]; ends: of the range tried, [trials, n], the whole range first.

    importance: [n, g], or None for all alike.
    """
    scales, zero_points = _grid(*ends, num_bits, symmetric, scale_dtype, name)
    errors = torch.empty_like(scales)
    for trial, scale in enumerate(scales):
        zero_point = None if zero_points is None else zero_points[trial]
        difference = _positions(groups, scale, zero_point)
        difference -= torch.round(difference).clamp_(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)
        # |d|^p by logarithms, which takes less than half of the time that `pow` does; log2(0) * p comes back as 0
        difference.abs_().log2_().mul_(ERROR_POWER).exp2_()
        torch.sum(difference if importance is None else difference.mul_(importance), dim=-1, out=errors[trial])
    # Errors are summed in steps and weighed by the step over the full range: |w|^2.4 of tiny weights is no float.
    whole = ends[1][0] - ends[0][0]
    errors *= (scales / torch.where(whole > 0, whole, 1.0)).pow_(ERROR_POWER)
    best = errors.argmin(dim=0, keepdim=True)
    return scales.gather(0, best)[0], None if zero_points is None else zero_points.gather(0, best)[0]


def _storable(scale: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The scales as they will read back from `dtype`, in float32; never zero, so that dividing by them is safe."""
    stored = scale.to(dtype).to(torch.float32)
    if not bool(torch.isfinite(stored).all()):
        raise PowertrainError(f"{name}: weights are too large for {dtype} scales; choose dtype bfloat16 or float32")
    underflow = torch.full_like(stored, torch.finfo(dtype).tiny)
    stored = torch.where((stored == 0) & (scale > 0), underflow, stored)
    return torch.where(scale == 0, torch.ones_like(stored), stored)
