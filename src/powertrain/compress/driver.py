"""The driver: a model in, a compressed checkpoint folder out, one tensor in memory at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from powertrain.compress.floats import static_input_scale, to_preset
from powertrain.compress.gptq import Moments, gptq
from powertrain.compress.gptq_floats import gptq_floats
from powertrain.compress.kv_cache import CacheSizes
from powertrain.compress.leak import Grid, describe_leaks, find_grid
from powertrain.compress.manifest import MANIFEST_FILE, manifest_text, weights_sha256
from powertrain.compress.model_step import Progress, StepContext, apply_steps
from powertrain.compress.plain_decoder import LINEARS_OF_STEP, Weights
from powertrain.compress.plan import EMBEDDING, CompressionPlan, LayerPlan, make_plan, target_groups
from powertrain.compress.quantize import rtn, weight_error
from powertrain.compress.recipe import AnyStep, Recipe, Step, load_recipe, shared_scale
from powertrain.compress.report import CompressionReport, LayerReport
from powertrain.compress.sign_rounding import SignRoundingOptions, round_block
from powertrain.model.families import model_config
from powertrain.model.float4 import Float4Weight
from powertrain.model.float8 import Float8Weight
from powertrain.model.weights import IntWeight
from powertrain.types import PowertrainError, QuantScheme

FINAL_NORM = "model.norm.weight"
DEVICES = ("auto", "cpu", "cuda")
Quantized = IntWeight | Float8Weight | Float4Weight


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
    device: str = "auto",
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
    of token ids, of which `num_samples` windows of `length` tokens are drawn by `seed`. `device` is where it computes
    (`auto`: CUDA if there is one and a method is calibrated). Raises `PowertrainError` naming the layer, key or file at
    fault.
    """
    started = time.perf_counter()
    parsed = load_recipe(recipe)
    checkpoint = open_checkpoint(resolve_model(model))
    plan = make_plan(checkpoint, parsed, dtype)
    samples = _calibration(checkpoint, plan, calibration, num_samples, length, seed)
    place = _choose_device(device, parsed)
    context = StepContext(
        calibration=samples,
        layers={layer.name: layer for layer in plan.layers},
        device=place,
        progress=progress,
    )
    changed = apply_steps(checkpoint, parsed.model_steps, context)
    writer = _Writer(changed, plan, samples, place, progress, seed)
    extra_files: dict[str, bytes | str] = _text_files(checkpoint) | ngram_files(samples)
    reports: list[CompressionReport] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield from writer.tensors()
        # The manifest holds the errors, which are known now: files are written after the last tensor.
        reports.append(writer.report(str(model), checkpoint, Path(out), time.perf_counter() - started))
        extra_files[MANIFEST_FILE] = manifest_text(reports[0].to_dict())

    write_checkpoint(Path(out), _config(plan), tensors(), extra_files, overwrite=overwrite)
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
    reasons = {_why_calibrated(step) for step in plan.recipe.all_steps if step.is_calibrated}
    if not reasons:
        return None
    if data is None:
        raise PowertrainError(f"{', '.join(sorted(reasons))} needs calibration text: give --calibration FILE, or self")
    return calibration_set(data, checkpoint, num_samples=num_samples, length=length, seed=seed)


def _why_calibrated(step: AnyStep) -> str:
    """What of a step looks at activations: its method, or its scheme where that is only rounded to nearest."""
    if isinstance(step, Step) and step.method == "rtn":
        return step.scheme_name
    return str(step.to_dict()["method"])


def _choose_device(device: str, recipe: Recipe) -> torch.device:
    if device not in DEVICES:
        raise PowertrainError(f"device {device!r} is unknown; the known ones are {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise PowertrainError("device cuda: torch sees no CUDA device here; take cpu")
    if device == "auto":
        device = "cuda" if recipe.is_calibrated and torch.cuda.is_available() else "cpu"
    return torch.device(device)


class _Writer:
    """Turns a plan into tensors, block by block, and remembers what became of each."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: CompressionPlan,
        calibration: CalibrationSet | None,
        device: torch.device,
        progress: Progress | None,
        seed: int,
    ) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._calibration = calibration
        self._device = device
        self._progress = progress
        self._seed = seed
        self._done = 0
        self._layers: list[LayerReport] = []
        self._grids: list[tuple[str, Grid | None]] = []
        self._cache_ranges: list[tuple[float, ...]] = []
        self._nbytes = 0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        walk = self._walk()
        first, blocks, rest = names_by_block(self._checkpoint.names())
        for name in first:
            yield from self._emit(name, self._load(name), {})
        for index, names in enumerate(blocks):
            yield from self._block(index, names, walk)
        for name in rest:
            yield from self._emit(name, self._load(name), {})
        yield from self._head(walk)

    def _block(
        self, index: int, names: Sequence[str], walk: CalibratedWalk | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """A block's tensors. A function of its own, so that they are gone when the next block's come."""
        weights = {name: self._load(name) for name in names}
        sizes = None if self._plan.recipe.kv_cache is None else CacheSizes()
        found = self._quantized_block(index, weights, walk, sizes)
        for name, weight in weights.items():
            yield from self._emit(name, weight, found)
        if sizes is not None:
            yield from self._count(self._cache_scales(index, sizes))

    def _walk(self) -> CalibratedWalk | None:
        """The calibration's way through the model, if a step wants it."""
        steps = [layer.step for layer in self._plan.layers]
        is_wanted = self._plan.recipe.kv_cache is not None or any(step.is_calibrated for step in steps)
        if self._calibration is None or not is_wanted:
            return None
        embedding = self._checkpoint.load(f"{EMBEDDING}.weight")
        return CalibratedWalk(
            model_config(self._checkpoint.config),
            embedding.to(self._device),
            self._calibration.token_ids,
            keeps_original=any(step.wants_original for step in steps),
            wants_hessians=any(step.method == "gptq" for step in steps),
        )

    def _load(self, name: str) -> torch.Tensor:
        weight = self._checkpoint.load(name)
        if weight.dim() == 2:
            self._grids.append((name, find_grid(weight)))
        return weight.to(self._device)

    def _quantized_block(
        self,
        index: int,
        weights: dict[str, torch.Tensor],
        walk: CalibratedWalk | None,
        sizes: CacheSizes | None,
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The stored tensors of each matrix of a block that the plan quantizes, by its layer's name.

        `sizes` learns how large its keys and values become.
        """
        prefix = f"model.layers.{index}."
        layers = {layer.name: layer for layer in self._plan.layers if f"{layer.name}.weight" in weights}
        if walk is None:
            return {
                name: self._quantize(layer, weights[f"{name}.weight"], absmax=_shared_absmax(name, weights))[0]
                for name, layer in layers.items()
            }
        within = {name.removeprefix(prefix): weight.float() for name, weight in weights.items()}
        by_name = {name.removeprefix(prefix): layer for name, layer in layers.items()}
        jointly = self._rounded_jointly(index, within, by_name, walk)
        found = {prefix + name: self._stored(by_name[name], ints, error) for name, (ints, error) in jointly.items()}
        absmax = {name: _shared_absmax(name, weights) for name in layers}

        def compress_one(name: str, weight: torch.Tensor, moments: Moments) -> torch.Tensor:
            tensors, quantized = self._quantize(layers[prefix + name], weight, moments, absmax[prefix + name])
            found[prefix + name] = tensors
            return quantized.dequantize()

        changed = {f"{name}.weight": ints.dequantize() for name, (ints, _) in jointly.items()}
        look = None if sizes is None else sizes.add
        walk.through(index, within, by_name.keys() - jointly.keys(), compress_one, changed, look)
        return found

    def _cache_scales(self, index: int, sizes: CacheSizes) -> dict[str, torch.Tensor]:
        """The stored scales of a block's keys and values, whose ranges are remembered."""
        assert self._plan.recipe.kv_cache is not None
        name = f"model.layers.{index}.self_attn"
        self._cache_ranges.append(tuple(float(largest.amax()) for largest in sizes.largest(name)))
        num_kv_heads = model_config(self._checkpoint.config).num_kv_heads
        return sizes.tensors(name, self._plan.recipe.kv_cache.scheme, num_kv_heads)

    def _rounded_jointly(
        self, index: int, weights: Weights, layers: Mapping[str, LayerPlan], walk: CalibratedWalk
    ) -> dict[str, tuple[IntWeight, float]]:
        """Integers and weight error of the matrices that are rounded together: those with the same options."""
        together: dict[SignRoundingOptions, dict[str, QuantScheme]] = {}
        for name, layer in layers.items():
            if layer.step.method == "autoround" and isinstance(layer.scheme, QuantScheme):
                together.setdefault(replace(layer.step.autoround, seed=self._seed), {})[name] = layer.scheme
        found: dict[str, tuple[IntWeight, float]] = {}
        current = dict(weights)
        for options, schemes in together.items():
            inputs, targets = walk.examples(index, weights, is_original=options.target == "original")
            config, scale_dtype = model_config(self._checkpoint.config), self._plan.dtype
            rounded = round_block(config, index, current, schemes, inputs, targets, options, scale_dtype=scale_dtype)
            for name, ints in rounded.matrices.items():
                found[name] = (ints, weight_error(weights[f"{name}.weight"], ints.dequantize()))
                current[f"{name}.weight"] = ints.dequantize()
        return found

    def _head(self, walk: CalibratedWalk | None) -> Iterator[tuple[str, torch.Tensor]]:
        """A head that is quantized comes last: its inputs are the last block's outputs."""
        for layer in self._plan.layers:
            if block_of(layer.name) is None:
                norm = self._checkpoint.load(FINAL_NORM).float().to(self._device)
                weight = self._checkpoint.load(layer.source).to(self._device)
                yield from self._count(self._quantize(layer, weight, walk.head_moments(norm) if walk else None)[0])

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
            return tensor.cpu()
        stored = tensor.to("cpu", self._plan.dtype)
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
            if step.method == "gptq":
                assert moments is not None
                floats, error = gptq_floats(
                    weight, layer.scheme, moments, step.gptq_options(), absmax=absmax, name=name
                )
            else:
                floats, error = to_preset(weight, layer.scheme, search=step.observer == "mse", absmax=absmax, name=name)
            quantized = floats
        else:
            if step.method == "gptq":
                assert moments is not None
                ints, error = gptq(
                    weight, layer.scheme, moments, step.gptq_options(), scale_dtype=scale_dtype, name=name
                )
            else:
                ints, error = rtn(weight, layer.scheme, scale_dtype=scale_dtype, observer=step.observer, name=name)
            quantized = ints
        return self._stored(layer, quantized, error, _input_scale(layer, moments)), quantized

    def _stored(
        self, layer: LayerPlan, quantized: Quantized, error: float, input_scale: float | None = None
    ) -> dict[str, torch.Tensor]:
        """A matrix's tensors as they are stored; the layer is reported as done."""
        if isinstance(layer.scheme, FloatScheme):
            assert not isinstance(quantized, IntWeight)
            tensors = layer.scheme.tensors(layer.name, quantized, input_scale)
        else:
            assert isinstance(quantized, IntWeight)
            tensors = int_weight_tensors(layer.name, quantized, stored_format(layer.scheme))
        tensors = {tensor_name: tensor.cpu() for tensor_name, tensor in tensors.items()}
        self._layers.append(
            LayerReport(
                name=layer.name,
                shape=layer.shape,
                method=layer.step.method,
                scheme=layer.step.scheme_name,
                group_size=shared_scale(layer.scheme),
                error=error,
                nbytes=sum(tensor.nbytes for tensor in tensors.values()),
                input_scale=input_scale,
            )
        )
        self._report_progress()
        return tensors

    def report(self, model: str, source: Checkpoint, out: Path, seconds: float) -> CompressionReport:
        return CompressionReport(
            out=out,
            source=model,
            source_sha256=weights_sha256(source.path),
            recipe=self._plan.recipe,
            calibration=self._calibration,
            dtype=str(self._plan.dtype).removeprefix("torch."),
            layers=tuple(self._layers),
            num_parameters=self._plan.num_parameters,
            nbytes=self._nbytes,
            source_nbytes=sum(source.nbytes(name) for name in source.names()),
            warnings=tuple(describe_leaks(self._grids)),
            notes=(*self._plan.notes, *_range_notes(self._cache_ranges)),
            seconds=seconds,
        )


def _range_notes(ranges: Sequence[tuple[float, ...]]) -> list[str]:
    """How large keys and values become, and in which layer, of (largest key, largest value) by layer."""
    if not ranges:
        return []
    (key, of_key), (value, of_value) = (max((sizes[part], at) for at, sizes in enumerate(ranges)) for part in (0, 1))
    found = f"keys reach {key:.4g} (layer {of_key}), values {value:.4g} (layer {of_value})"
    return [f"kv_cache: on the calibration text {found}"]


def _input_scale(layer: LayerPlan, moments: Moments | None) -> float | None:
    """The static scale of a layer's inputs, where its scheme has one; matrices that read the same input share it."""
    if not isinstance(layer.scheme, FloatScheme) or not layer.scheme.has_input_scale:
        return None
    assert moments is not None
    return static_input_scale(moments.size_max, layer.name)


def _shared_absmax(name: str, weights: dict[str, torch.Tensor]) -> float:
    """The largest size among the matrices that share a layer's input: other engines multiply by them as one."""
    prefix, within = ".".join(name.split(".")[:3]), ".".join(name.split(".")[3:])
    together = next((names for names in LINEARS_OF_STEP.values() if within in names), (within,))
    found = [weights[f"{prefix}.{one}.weight"] for one in together if f"{prefix}.{one}.weight" in weights]
    return max(float(weight.abs().amax()) for weight in found)


def _config(plan: CompressionPlan) -> dict[str, Any]:
    config = {key: value for key, value in plan.config.items() if key not in ("dtype", "torch_dtype")}
    config["torch_dtype"] = str(plan.dtype).removeprefix("torch.")
    if plan.unties_head:
        config["tie_word_embeddings"] = False
    kv_cache = plan.recipe.kv_cache
    if plan.layers or kv_cache is not None:
        groups, ignore = target_groups(plan) if plan.layers else ([], [])
        scheme = None if kv_cache is None else kv_cache.scheme
        config["quantization_config"] = quantization_config(groups, ignore, scheme)
    return config


def _text_files(checkpoint: Checkpoint) -> dict[str, bytes | str]:
    """Tokenizer, chat template and generation settings: copied from a folder, written out from a GGUF file."""
    from powertrain.checkpoint.tokenizer_files import hugging_face_files

    files: dict[str, bytes | str] = dict(hugging_face_files(checkpoint.path))
    if checkpoint.generation_config:
        files["generation_config.json"] = json.dumps(checkpoint.generation_config, indent=2) + "\n"
    return files
