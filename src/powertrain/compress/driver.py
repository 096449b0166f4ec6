"""The driver: a model in, a compressed checkpoint folder out, one tensor in memory at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from powertrain.checkpoint.compressed_tensors import int_weight_tensors, quantization_config, stored_format
from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.compress.leak import Grid, describe_leaks, find_grid
from powertrain.compress.manifest import MANIFEST_FILE, manifest_text, weights_sha256
from powertrain.compress.plan import CompressionPlan, LayerPlan, make_plan, target_groups
from powertrain.compress.quantize import rtn
from powertrain.compress.recipe import CHANNEL, Recipe, load_recipe
from powertrain.types import PowertrainError

Progress = Callable[[str, float, float | None], None]
"""Called as (what, done, total)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """What one matrix became. `error` is ||w - w'||^2 / ||w||^2; `nbytes` counts integers, scales and zero points."""

    name: str
    shape: tuple[int, int]
    method: str
    scheme: str
    group_size: int | str
    error: float
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionReport:
    """What a compression did. `nbytes` is all stored tensors; `bits_per_weight` is over all weights of the source.

    `warnings` are about the source (it lies on a grid already), `notes` about choices made for single layers.
    """

    out: Path
    source: str
    source_sha256: str
    recipe: Recipe
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
        errors = [layer.error for layer in self.layers]
        worst = max(self.layers, key=lambda layer: layer.error)
        lines = [
            f"wrote {self.out}: {len(self.layers)} matrices, {self.nbytes:,} bytes of weights "
            f"(source {self.source_nbytes:,}), {self.bits_per_weight:.2f} bits per weight over all weights",
            f"squared weight error: mean {sum(errors) / len(errors):.5f}, worst {worst.error:.5f} ({worst.name})",
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings), *self.notes])


def plan_compression(
    model: str | Path, recipe: str | Path | Mapping[str, Any] | Recipe, *, dtype: str = "auto"
) -> CompressionPlan:
    """What `compress` would do, without reading a weight: `print(plan.table())`. Raises what `compress` would."""
    return make_plan(open_checkpoint(resolve_model(model)), load_recipe(recipe), dtype)


def compress(
    model: str | Path,
    out: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompressionReport:
    """Quantize `model` by `recipe` into the folder `out`, a compressed-tensors checkpoint that other engines read too.

    `recipe` is a preset name, a YAML file, a dictionary or a `Recipe`. `dtype` is that of the scales and of the tensors
    that stay dense (`auto`: half precision as the source has it, else bfloat16). The folder appears whole or not at
    all; it holds weights, config, tokenizer files and the manifest `powertrain.json`. An existing output is replaced
    only with `overwrite`. Raises `PowertrainError` naming the layer, key or file at fault.
    """
    started = time.perf_counter()
    parsed = load_recipe(recipe)
    checkpoint = open_checkpoint(resolve_model(model))
    plan = make_plan(checkpoint, parsed, dtype)
    writer = _Writer(checkpoint, plan, progress)
    extra_files: dict[str, bytes | str] = _text_files(checkpoint)
    reports: list[CompressionReport] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from writer.tensors()
        # The manifest holds the errors, which are known now: files are written after the last tensor.
        reports.append(writer.report(str(model), Path(out), time.perf_counter() - started))
        extra_files[MANIFEST_FILE] = manifest_text(reports[0].to_dict())

    write_checkpoint(Path(out), _config(checkpoint, plan), tensors(), extra_files, overwrite=overwrite)
    return reports[0]


class _Writer:
    """Turns a plan into tensors, in the source's order, and remembers what became of each."""

    def __init__(self, checkpoint: Checkpoint, plan: CompressionPlan, progress: Progress | None) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._progress = progress
        self._layers: list[LayerReport] = []
        self._grids: list[tuple[str, Grid | None]] = []
        self._nbytes = 0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        by_source: dict[str, list[LayerPlan]] = {}
        for layer in self._plan.layers:
            by_source.setdefault(layer.source, []).append(layer)
        names = self._checkpoint.names()
        for done, name in enumerate(names):
            weight = self._checkpoint.load(name)
            if weight.dim() == 2:
                self._grids.append((name, find_grid(weight)))
            if name in self._plan.dense:
                yield from self._count({name: self._dense(name, weight)})
            for layer in by_source.get(name, ()):
                yield from self._count(self._quantize(layer, weight))
            if self._progress is not None:
                self._progress("compress", done + 1, len(names))

    def _count(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        self._nbytes += sum(tensor.nbytes for tensor in tensors.values())
        yield from tensors.items()

    def _dense(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        stored = tensor.to(self._plan.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise PowertrainError(f"{name}: holds NaN, infinity or a value beyond {self._plan.dtype}")
        return stored

    def _quantize(self, layer: LayerPlan, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        quantized, error = rtn(
            weight, layer.scheme, scale_dtype=self._plan.dtype, observer=layer.step.observer, name=layer.name
        )
        tensors = int_weight_tensors(layer.name, quantized, stored_format(layer.scheme))
        self._layers.append(
            LayerReport(
                name=layer.name,
                shape=layer.shape,
                method=layer.step.method,
                scheme=layer.step.scheme_name,
                group_size=layer.scheme.group_size or CHANNEL,
                error=error,
                nbytes=sum(tensor.nbytes for tensor in tensors.values()),
            )
        )
        return tensors

    def report(self, source: str, out: Path, seconds: float) -> CompressionReport:
        checkpoint = self._checkpoint
        return CompressionReport(
            out=out,
            source=source,
            source_sha256=weights_sha256(checkpoint.path),
            recipe=self._plan.recipe,
            dtype=str(self._plan.dtype).removeprefix("torch."),
            layers=tuple(self._layers),
            num_parameters=self._plan.num_parameters,
            nbytes=self._nbytes,
            source_nbytes=sum(checkpoint.nbytes(name) for name in checkpoint.names()),
            warnings=tuple(describe_leaks(self._grids)),
            notes=self._plan.notes,
            seconds=seconds,
        )


def _config(checkpoint: Checkpoint, plan: CompressionPlan) -> dict[str, Any]:
    config = {key: value for key, value in checkpoint.config.items() if key not in ("dtype", "torch_dtype")}
    config["torch_dtype"] = str(plan.dtype).removeprefix("torch.")
    if plan.unties_head:
        config["tie_word_embeddings"] = False
    groups, ignore = target_groups(plan)
    config["quantization_config"] = quantization_config(groups, ignore)
    return config


def _text_files(checkpoint: Checkpoint) -> dict[str, bytes | str]:
    """Tokenizer, chat template and generation settings: copied from a folder, written out from a GGUF file."""
    from powertrain.checkpoint.tokenizer_files import hugging_face_files

    files: dict[str, bytes | str] = dict(hugging_face_files(checkpoint.path))
    if checkpoint.generation_config:
        files["generation_config.json"] = json.dumps(checkpoint.generation_config, indent=2) + "\n"
    return files
