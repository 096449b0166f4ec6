"""What a compression did: for people, for programs and for the folder's manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from powertrain.compress.calibrate import CalibrationSet
from powertrain.compress.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What one matrix became. `error` is ||w - w'||^2 / ||w||^2; `nbytes` counts integers, scales and zero points.

    `group_size`: weights of a row that share a scale, `channel` or `tensor`. `input_scale`: of its inputs, where the
    file has one for good.
    """

    name: str
    shape: tuple[int, int]
    method: str
    scheme: str
    group_size: int | str
    error: float
    nbytes: int
    input_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionReport:
    """What a compression did. `nbytes` is all stored tensors; `bits_per_weight` is over all weights of the source.

    `warnings` are about the source (it lies on a grid already), `notes` about choices made for single layers.
    """

    out: Path
    source: str
    source_sha256: str
    recipe: Recipe
    calibration: CalibrationSet | None
    dtype: str
    layers: tuple[LayerReport, ...]
    num_parameters: int
    nbytes: int
    source_nbytes: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.num_parameters

    def to_dict(self) -> dict[str, Any]:
        """The manifest: JSON-ready, schema 1, without the output path (folders are moved)."""
        from powertrain import __version__

        return {
            "schema": 1,
            "kind": "compression",
            "written_by": "powertrain",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "software": {"powertrain": __version__, "torch": torch.__version__},
            "source": {"model": self.source, "sha256": self.source_sha256, "bytes": self.source_nbytes},
            "recipe": self.recipe.to_dict(),
            "calibration": self.calibration.to_dict() if self.calibration is not None else None,
            "dtype": self.dtype,
            "num_parameters": self.num_parameters,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "layers": [asdict(layer) for layer in self.layers],
            "evaluation": None,
        }

    def summary(self) -> str:
        """A few lines for people: where, how large, the mean and the worst error, the warnings and notes."""
        if not self.layers:
            return "\n".join([f"wrote {self.out}: {self.nbytes:,} bytes of dense {self.dtype} weights", *self.notes])
        errors = [layer.error for layer in self.layers]
        worst = max(self.layers, key=lambda layer: layer.error)
        lines = [
            f"wrote {self.out}: {len(self.layers)} matrices, {self.nbytes:,} bytes of weights "
            f"(source {self.source_nbytes:,}), {self.bits_per_weight:.2f} bits per weight over all weights",
            f"squared weight error: mean {sum(errors) / len(errors):.5f}, worst {worst.error:.5f} ({worst.name})",
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings), *self.notes])
