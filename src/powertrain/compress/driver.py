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
from powertrain.checkpoint.float_presets import FloatScheme
from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.compress.blockwise import CalibratedWalk, block_of, names_by_block
from powertrain.compress.calibrate import (
    LENGTH,
    NUM_SAMPLES,
    CalibrationData,
    CalibrationSet,
    calibration_set,
    ngram_files,
)
from powertrain.compress.floats import to_preset
from powertrain.compress.gptq import Moments, gptq
from powertrain.compress.leak import Grid, describe_leaks, find_grid
from powertrain.compress.manifest import MANIFEST_FILE, manifest_text, weights_sha256
from powertrain.compress.plain_decoder import LINEARS_OF_STEP
from powertrain.compress.plan import EMBEDDING, CompressionPlan, LayerPlan, make_plan, target_groups
from powertrain.compress.quantize import rtn
from powertrain.compress.recipe import CHANNEL, Recipe, load_recipe
from powertrain.model.families import model_config
from powertrain.model.float4 import Float4Weight
from powertrain.model.float8 import Float8Weight
from powertrain.model.weights import IntWeight
from powertrain.types import PowertrainError

FINAL_NORM = "model.norm.weight"
Quantized = IntWeight | Float8Weight | Float4Weight

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
    calibration: CalibrationData | None = None,
    num_samples: int = NUM_SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompressionReport:
    """Quantize `model` by `recipe` into the folder `out`, a compressed-tensors checkpoint that other engines read too.

    `recipe` is a preset name, a YAML file, a dictionary or a `Recipe`. `dtype` is that of the scales and of the tensors
    that stay dense (`auto`: half precision as the source has it, else bfloat16). The folder appears whole or not at
    all; it holds weights, config, tokenizer files and the manifest `powertrain.json`. An existing output is replaced
    only with `overwrite`. `calibration`, for methods that need it: a file of text or JSON lines, several, or sequences
    of token ids, of which `num_samples` windows of `length` tokens are drawn by `seed`. Raises `PowertrainError` naming
    the layer, key or file at fault.
    """
    started = time.perf_counter()
    parsed = load_recipe(recipe)
    checkpoint = open_checkpoint(resolve_model(model))
    plan = make_plan(checkpoint, parsed, dtype)
    samples = _calibration(checkpoint, plan, calibration, num_samples, length, seed)
    writer = _Writer(checkpoint, plan, samples, progress)
    extra_files: dict[str, bytes | str] = _text_files(checkpoint) | ngram_files(samples)
    reports: list[CompressionReport] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from writer.tensors()
        # The manifest holds the errors, which are known now: files are written after the last tensor.
        reports.append(writer.report(str(model), Path(out), time.perf_counter() - started))
        extra_files[MANIFEST_FILE] = manifest_text(reports[0].to_dict())

    write_checkpoint(Path(out), _config(checkpoint, plan), tensors(), extra_files, overwrite=overwrite)
    return reports[0]


def _calibration(
    checkpoint: Checkpoint,
    plan: CompressionPlan,
    data: CalibrationData | None,
    num_samples: int,
    length: int,
    seed: int,
) -> CalibrationSet | None:
    """The calibration set, where a step of the plan looks at one."""
    methods = {layer.step.method for layer in plan.layers if layer.step.is_calibrated}
    if not methods:
        return None
    if data is None:
        raise PowertrainError(f"{', '.join(sorted(methods))} needs calibration text: give --calibration FILE, or self")
    return calibration_set(data, checkpoint, num_samples=num_samples, length=length, seed=seed)


class _Writer:
    """Turns a plan into tensors, block by block, and remembers what became of each."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: CompressionPlan,
        calibration: CalibrationSet | None,
        progress: Progress | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._calibration = calibration
        self._progress = progress
        self._done = 0
        self._layers: list[LayerReport] = []
        self._grids: list[tuple[str, Grid | None]] = []
        self._nbytes = 0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        walk = self._walk()
        first, blocks, rest = names_by_block(self._checkpoint.names())
        for name in first:
            yield from self._emit(name, self._load(name), {})
        for index, names in enumerate(blocks):
            weights = {name: self._load(name) for name in names}
            found = self._quantized_block(index, weights, walk)
            for name, weight in weights.items():
                yield from self._emit(name, weight, found)
        for name in rest:
            yield from self._emit(name, self._load(name), {})
        yield from self._head(walk)

    def _walk(self) -> CalibratedWalk | None:
        """The calibration's way through the model, if a step wants it."""
        steps = [layer.step for layer in self._plan.layers]
        if self._calibration is None or not any(step.is_calibrated for step in steps):
            return None
        embedding = self._checkpoint.load(f"{EMBEDDING}.weight")
        return CalibratedWalk(
            model_config(self._checkpoint.config),
            embedding,
            self._calibration.token_ids,
            keeps_original=any(step.correction == "asymmetric" for step in steps),
        )

    def _load(self, name: str) -> torch.Tensor:
        weight = self._checkpoint.load(name)
        if weight.dim() == 2:
            self._grids.append((name, find_grid(weight)))
        return weight

    def _quantized_block(
        self, index: int, weights: dict[str, torch.Tensor], walk: CalibratedWalk | None
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The stored tensors of each matrix of a block that the plan quantizes, by its layer's name."""
        prefix = f"model.layers.{index}."
        layers = {layer.name: layer for layer in self._plan.layers if f"{layer.name}.weight" in weights}
        if walk is None:
            return {
                name: self._quantize(layer, weights[f"{name}.weight"], absmax=_shared_absmax(name, weights))[0]
                for name, layer in layers.items()
            }
        found: dict[str, dict[str, torch.Tensor]] = {}
        absmax = {name: _shared_absmax(name, weights) for name in layers}

        def compress_one(name: str, weight: torch.Tensor, moments: Moments) -> torch.Tensor:
            tensors, quantized = self._quantize(layers[prefix + name], weight, moments, absmax[prefix + name])
            found[prefix + name] = tensors
            return quantized.dequantize()

        within = {name.removeprefix(prefix): weight.float() for name, weight in weights.items()}
        walk.through(index, within, {name.removeprefix(prefix) for name in layers}, compress_one)
        return found

    def _head(self, walk: CalibratedWalk | None) -> Iterator[tuple[str, torch.Tensor]]:
        """A head that is quantized comes last: its inputs are the last block's outputs."""
        for layer in self._plan.layers:
            if block_of(layer.name) is None:
                moments = None if walk is None else walk.head_moments(self._checkpoint.load(FINAL_NORM).float())
                yield from self._count(self._quantize(layer, self._checkpoint.load(layer.source), moments)[0])

    def _emit(
        self, name: str, weight: torch.Tensor, quantized: dict[str, dict[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        if name in self._plan.dense:
            yield from self._count({name: self._dense(name, weight)})
            self._report_progress()
        yield from self._count(quantized.get(name.removesuffix(".weight"), {}))

    def _report_progress(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("compress", self._done, len(self._plan.dense) + len(self._plan.layers))

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

    def _quantize(
        self, layer: LayerPlan, weight: torch.Tensor, moments: Moments | None = None, absmax: float | None = None
    ) -> tuple[dict[str, torch.Tensor], Quantized]:
        """A matrix's tensors as they are stored, and what they stand for."""
        step, name, scale_dtype = layer.step, layer.name, self._plan.dtype
        quantized: Quantized
        if isinstance(layer.scheme, FloatScheme):
            floats, error = to_preset(weight, layer.scheme, search=step.observer == "mse", absmax=absmax, name=name)
            quantized, tensors = floats, layer.scheme.tensors(name, floats)
        else:
            if step.method == "gptq":
                assert moments is not None
                ints, error = gptq(
                    weight, layer.scheme, moments, step.gptq_options(), scale_dtype=scale_dtype, name=name
                )
            else:
                ints, error = rtn(weight, layer.scheme, scale_dtype=scale_dtype, observer=step.observer, name=name)
            quantized, tensors = ints, int_weight_tensors(name, ints, stored_format(layer.scheme))
        self._layers.append(
            LayerReport(
                name=layer.name,
                shape=layer.shape,
                method=step.method,
                scheme=step.scheme_name,
                group_size=layer.scheme.group_size or CHANNEL,
                error=error,
                nbytes=sum(tensor.nbytes for tensor in tensors.values()),
            )
        )
        self._report_progress()
        return tensors, quantized

    def report(self, source: str, out: Path, seconds: float) -> CompressionReport:
        checkpoint = self._checkpoint
        return CompressionReport(
            out=out,
            source=source,
            source_sha256=weights_sha256(checkpoint.path),
            recipe=self._plan.recipe,
            calibration=self._calibration,
            dtype=str(self._plan.dtype).removeprefix("torch."),
            layers=tuple(self._layers),
            num_parameters=self._plan.num_parameters,
            nbytes=self._nbytes,
            source_nbytes=sum(checkpoint.nbytes(name) for name in checkpoint.names()),
            warnings=tuple(describe_leaks(self._grids)),
            notes=self._plan.notes,
            seconds=seconds,
        )


def _shared_absmax(name: str, weights: dict[str, torch.Tensor]) -> float:
    """The largest size among the matrices that share a layer's input: other engines multiply by them as one."""
    prefix, within = ".".join(name.split(".")[:3]), ".".join(name.split(".")[3:])
    together = next((names for names in LINEARS_OF_STEP.values() if within in names), (within,))
    found = [weights[f"{prefix}.{one}.weight"] for one in together if f"{prefix}.{one}.weight" in weights]
    return max(float(weight.abs().amax()) for weight in found)


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
