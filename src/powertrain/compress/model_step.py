"""Steps of a recipe that change the whole model before any matrix is rounded: rotations, scalings, pruning.

Each maps a checkpoint to a checkpoint. What comes out is a view that computes a tensor when it is asked for it, so
that nothing is copied and steps can follow each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from powertrain.checkpoint.source import Checkpoint
from powertrain.types import ModelFileError

if TYPE_CHECKING:
    from powertrain.compress.calibrate import CalibrationSet
    from powertrain.compress.plan import LayerPlan

Progress = Callable[[str, float, float | None], None]
"""Called as (what, done, total)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What a model step may look at beside the checkpoint.

    `calibration` is None where no step of the recipe is calibrated; `layers` are the matrices that later steps
    round, by name; `device` is where to compute (what `load` returns stays on the CPU).
    """

    calibration: CalibrationSet | None = None
    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress | None = None


class ModelStep(Protocol):
    """One step. It is immutable, and made by a parser that `recipe.MODEL_STEPS` names."""

    @property
    def is_calibrated(self) -> bool:
        """Whether `apply` looks at `context.calibration`, which is then there."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The step as a recipe file would have it, every default written out."""
        ...

    def outline(self, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        """The config, names and shapes that `apply` will give (its `load` is never called), and notes on them.

        Reads shapes only. The notes are for --dry-run, the report and the manifest; the first says what the step is.
        Raises `PowertrainError` where the step does not fit the model.
        """
        ...

    def apply(self, checkpoint: Checkpoint, context: StepContext) -> Checkpoint:
        """The changed model, as names and shapes that `outline` gave."""
        ...


class CheckpointView:
    """A checkpoint whose tensors are made from another's, each at its `load`."""

    def __init__(
        self,
        source: Checkpoint,
        shapes: Mapping[str, tuple[int, ...]],
        compute: Callable[[str], torch.Tensor],
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """shapes: of all tensors, in the order of `names`; compute: a tensor by name; config: the source's if None."""
        self.path: Path = source.path
        self.config: dict[str, Any] = dict(source.config if config is None else config)
        self.generation_config = source.generation_config
        self._shapes = dict(shapes)
        self._compute = compute

    def names(self) -> list[str]:
        return list(self._shapes)

    def load(self, name: str) -> torch.Tensor:
        if name not in self._shapes:
            raise ModelFileError(f"{self.path}: no tensor {name}")
        return self._compute(name)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise ModelFileError(f"{self.path}: no tensor {name}")
        return self._shapes[name]

    def nbytes(self, name: str) -> int:
        """As float32: the view is on no disk."""
        return 4 * math.prod(self.shape(name))


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tuple(checkpoint.shape(name)) for name in checkpoint.names()}


def outline_of(checkpoint: Checkpoint, steps: tuple[ModelStep, ...]) -> tuple[Checkpoint, list[str]]:
    """What all steps will give, one after the other, and their notes."""
    notes: list[str] = []
    for step in steps:
        checkpoint, found = step.outline(checkpoint)
        notes += found
    return checkpoint, notes


def apply_steps(checkpoint: Checkpoint, steps: tuple[ModelStep, ...], context: StepContext) -> Checkpoint:
    for step in steps:
        checkpoint = step.apply(checkpoint, context)
    return checkpoint
