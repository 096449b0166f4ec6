"""Is this matrix already on a grid? A source that was quantized before makes the next rounding look free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

GROUP_SIZES = (128, 64, 32, 16)
MAX_STEPS = 2**8 - 1
NUM_SAMPLED_GROUPS = 48
TOLERANCE = 1e-6
"""Normalised squared error below which groups count as lying on a grid: 8-bit rounding of real weights leaves 1e-5."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A matrix is `step * integer + offset` within every group of `group_size` inputs, with 2^num_bits levels."""

    group_size: int
    num_bits: int


def find_grid(weight: torch.Tensor) -> Grid | None:
    """The grid that a float matrix [out, in] already lies on, or None: the largest groups of 16 to 128, 2 to 8 bits.

    Tried on up to 48 groups spread over the matrix, for every number of steps between each group's minimum and
    maximum: the ends of a group lie on any grid that its values lie on, so some step count fits exactly. Groups of
    real weights do not all come within 1e-6 by chance. Milliseconds per matrix, whatever its size.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        return None
    for group_size in GROUP_SIZES:
        if weight.shape[1] % group_size:
            continue
        groups = _sample_groups(weight, group_size)
        # Almost every matrix that is on no grid shows it in its first groups, at a twelfth of the work.
        num_steps = _steps_that_fit(groups) if _steps_that_fit(groups[:4]) is not None else None
        if num_steps is not None:
            return Grid(group_size, max(2, num_steps.bit_length()))
    return None


def _sample_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Up to `NUM_SAMPLED_GROUPS` whole groups, evenly spaced over the matrix, float64 [n, group_size]."""
    per_row = weight.shape[1] // group_size
    num_groups = weight.shape[0] * per_row
    picked = torch.linspace(0, num_groups - 1, min(NUM_SAMPLED_GROUPS, num_groups)).round().long()
    rows = weight.view(weight.shape[0], per_row, group_size)
    return rows[picked // per_row, picked % per_row].to(torch.float64)


def _steps_that_fit(groups: torch.Tensor) -> int | None:
    """The fewest equal steps between minimum and maximum that express every group, or None; [n, g] float64."""
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    varied = (high > low).squeeze(1)
    if not bool(torch.isfinite(groups).all()) or not bool(varied.any()):
        return None
    groups, low, high = groups[varied], low[varied], high[varied]
    num_steps = torch.arange(1, MAX_STEPS + 1, dtype=torch.float64).view(-1, 1, 1)
    distances = squared_distances(groups, low, high - low, num_steps).sum(dim=2)
    fits = distances < TOLERANCE * groups.square().sum(dim=1)
    if not bool(fits.any(dim=0).all()):
        return None
    return int(fits.to(torch.int8).argmax(dim=0).max()) + 1


def squared_distances(
    values: torch.Tensor, low: torch.Tensor, span: torch.Tensor, num_steps: torch.Tensor | int
) -> torch.Tensor:
    """Squared distances of values [n, g] to the nearest of `num_steps` equal steps from low to low + span, [n, 1]."""
    step = span / num_steps
    position = (values - low) / step
    return ((position - position.round()) * step).square()


def describe_leaks(grids: Iterable[tuple[str, Grid | None]]) -> list[str]:
    """One warning per kind of grid found: how many matrices lie on it, and one of their names."""
    names: dict[Grid, list[str]] = {}
    num_matrices = 0
    for name, grid in grids:
        num_matrices += 1
        if grid is not None:
            names.setdefault(grid, []).append(name)
    return [
        f"source is already quantized: {len(found)} of {num_matrices} matrices (e.g. {found[0]}) lie on a "
        f"grid of {grid.num_bits} bits in groups of {grid.group_size}; results at this grid are not a loss measurement"
        for grid, found in sorted(names.items(), key=lambda item: -len(item[1]))
    ]
