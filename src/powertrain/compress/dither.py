"""Noise on weights that lie on a grid: the beginning of an off-grid twin of a model that was quantized before.

Where the leak detector finds a grid, every weight moves by a uniform draw of half a grid step at most either way, so
that the values between the grid's points are all equally likely: what the rounding that made the grid could have come
from. Unlike a rotated twin it is another model, and a worse one until it has been trained (`distill`) to say again what
the source says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.leak import MAX_STEPS, TOLERANCE, Grid, find_grid, squared_distances
from powertrain.compress.model_step import CheckpointView, StepContext, shapes_of
from powertrain.compress.recipe_fields import integer, refuse_unknown_keys

GROUPS_AT_ONCE = 65536
NUM_FIRST = 4
"""Values of a group that are tried first: most step counts fail on them, at a fraction of the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DitherStep:
    """`{method: dither, seed: 0}`: uniform noise of one grid step on every matrix that lies on a grid."""

    seed: int = 0

    @classmethod
    def parse(cls, entries: Mapping[str, Any], where: str) -> DitherStep:
        refuse_unknown_keys(entries, ("seed",), where)
        return cls(seed=integer(entries.get("seed", 0), f"{where}.seed"))

    @property
    def is_calibrated(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        return {"method": "dither", "seed": self.seed}

    def outline(self, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        note = (
            f"dither (seed {self.seed}): matrices on a grid get noise of half a step either way, others stay; "
            "the model is a worse one until `powertrain distill` heals it"
        )
        return checkpoint, [note]

    def apply(self, checkpoint: Checkpoint, context: StepContext) -> Checkpoint:
        def load(name: str) -> torch.Tensor:
            weight = checkpoint.load(name)
            grid = find_grid(weight)
            return weight if grid is None else dithered(weight, grid, generator_of(self.seed, name))

        return CheckpointView(checkpoint, shapes_of(checkpoint), load)


def generator_of(seed: int, name: str) -> torch.Generator:
    """The source of a tensor's noise: it depends on the seed and the name, not on the order of loading."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def dithered(weight: torch.Tensor, grid: Grid, generator: torch.Generator) -> torch.Tensor:
    """A float matrix [out, in] on `grid` with uniform noise of half a step either way, float32; groups on no grid,
    and those whose values are all the same, stay."""
    groups = weight.reshape(-1, grid.group_size)
    parts = []
    for part in torch.split(groups, GROUPS_AT_ONCE):
        noise = torch.rand(part.shape, generator=generator, dtype=torch.float64) - 0.5
        values = part.to(torch.float64)
        parts.append((values + noise * grid_steps(values, grid.num_bits).unsqueeze(1)).float())
    return torch.cat(parts).view(weight.shape)


def grid_steps(groups: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The step of each group's grid of 2^num_bits levels, float64 [n] of groups [n, g]; 0 where there is none.

    From minimum to maximum a group takes some whole number of steps: the largest that fits, so that what is found is
    never more than the step that made the group. Only where none fits within `num_bits` are more tried.
    """
    low = groups.amin(dim=1, keepdim=True)
    span = groups.amax(dim=1, keepdim=True) - low
    limit = TOLERANCE * groups.square().sum(dim=1)
    steps = torch.zeros_like(limit)
    left = span.squeeze(1).nonzero().squeeze(1)
    most = 2**num_bits - 1
    for num_steps in (*range(most, 0, -1), *range(most + 1, MAX_STEPS + 1)):
        found = left
        for columns in (slice(NUM_FIRST), slice(None)):
            distances = squared_distances(groups[found, columns], low[found], span[found], num_steps)
            found = found[distances.sum(dim=1) < limit[found]]
        steps[found] = span[found, 0] / num_steps
        left = left[steps[left] == 0]
        if not len(left):
            break
    return steps
