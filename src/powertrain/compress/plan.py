"""Which tensor becomes what, and how large: everything about a compression that is known before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from powertrain.checkpoint.compressed_tensors import PACKED, stored_format
from powertrain.checkpoint.float_presets import FloatScheme
from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.model_step import outline_of, shapes_of
from powertrain.compress.quantize import GROUP_SIZE_STEP, check_group_size, nearest_group_size
from powertrain.compress.recipe import CHANNEL, HEAD, Recipe, Scheme, Step, shared_scale
from powertrain.model.families import model_config
from powertrain.types import ModelFileError, PowertrainError, QuantScheme

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING = "model.embed_tokens"
SHAPE_BYTES = 16
"""`weight_shape`: two int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One matrix that will be quantized: `source` is the tensor it is made from, `shape` is [out, in]."""

    name: str
    source: str
    shape: tuple[int, int]
    step: Step
    scheme: Scheme

    @property
    def is_packed(self) -> bool:
        """Whether several integers share a word; schemes that quantize activations too store one in a byte."""
        return isinstance(self.scheme, QuantScheme) and stored_format(self.scheme) == PACKED

    @property
    def nbytes(self) -> int:
        """Bytes of the integers and of `weight_shape`; scales and zero points are in `parameter_bytes`."""
        out_features, in_features = self.shape
        if isinstance(self.scheme, FloatScheme):
            return self.scheme.nbytes(self.shape)[0]
        if not self.is_packed:
            return out_features * in_features
        return out_features * math.ceil(in_features * self.scheme.num_bits / 32) * 4 + SHAPE_BYTES

    def parameter_bytes(self, scale_bytes: int) -> int:
        """Bytes of the scales, `scale_bytes` each, and of the packed zero points."""
        out_features, in_features = self.shape
        if isinstance(self.scheme, FloatScheme):
            return self.scheme.nbytes(self.shape)[1]
        num_groups = in_features // (self.scheme.group_size or in_features)
        packed_zero_points = math.ceil(out_features * self.scheme.num_bits / 32) * 4
        zero_points = 0 if self.scheme.symmetric else packed_zero_points if self.is_packed else out_features
        return num_groups * (out_features * scale_bytes + zero_points)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionPlan:
    """What each tensor of a model gets. `dense` maps those that stay to their shapes.

    `dtype` is that of the dense tensors and the scales.
    `num_parameters` counts every weight of the model that is rounded once (a tied head is its embedding, also if a step
    unties it); `bits_per_weight` is all stored bits, scales and zero points and embedding included, over that count.
    `config` is that of the model after the recipe's model steps.
    """

    recipe: Recipe
    config: dict[str, Any]
    layers: tuple[LayerPlan, ...]
    dense: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    num_parameters: int
    unties_head: bool
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        dense = sum(math.prod(shape) for shape in self.dense.values()) * self.dtype.itemsize
        cache = 0 if self.recipe.kv_cache is None else self.recipe.kv_cache.nbytes(model_config(self.config))
        return dense + cache + sum(layer.nbytes + layer.parameter_bytes(self.dtype.itemsize) for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.num_parameters

    def table(self) -> str:
        """A line per group of equal layers: what it gets; then the dense rest and the totals."""
        rows: dict[tuple[str, str, str], int] = {}
        for layer in self.layers:
            kind = ".".join("*" if part.isdigit() else part for part in layer.name.split("."))
            size = f"group {layer.scheme.group_size}" if layer.scheme.group_size else shared_scale(layer.scheme)
            inputs = isinstance(layer.scheme, FloatScheme) and layer.scheme.has_input_scale
            observer = "" if layer.step.observer == "minmax" else f" {layer.step.observer}"
            what = (
                f"{layer.step.method} {layer.step.scheme_name} {size}{observer}{', one input scale' if inputs else ''}"
            )
            row = (kind, f"{layer.shape[0]} x {layer.shape[1]}", what)
            rows[row] = rows.get(row, 0) + 1
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
        lines = [f"{k:<{widths[0]}}  {s:>{widths[1]}}  x{n:<4} {what}" for (k, s, what), n in rows.items()]
        dense_weights = sum(math.prod(shape) for shape in self.dense.values())
        lines.append(f"{len(self.dense)} other tensors ({dense_weights:,} weights) stay dense in {_name(self.dtype)}")
        lines.append(f"{self.nbytes:,} bytes of weights, {self.bits_per_weight:.2f} bits per weight over all of them")
        return "\n".join([*lines, *self.notes])


def make_plan(checkpoint: Checkpoint, recipe: Recipe, dtype: str = "auto") -> CompressionPlan:
    """Decide for every tensor of `checkpoint` what it becomes. Reads shapes only.

    Raises `PowertrainError` for an unknown dtype, a source that is already quantized, a step that matches nothing, a
    layer matched twice, or a group size that does not divide a row (naming the layer and the sizes that do).
    """
    if "quantization_config" in checkpoint.config:
        raise PowertrainError(f"{checkpoint.path} is already quantized: compress the model it was made from")
    source_names, (checkpoint, notes) = set(checkpoint.names()), outline_of(checkpoint, recipe.model_steps)
    shapes = shapes_of(checkpoint)
    sources = _linear_sources(shapes, names_head=any(HEAD in step.match for step in recipe.steps))
    assigned = recipe.assign(list(sources))
    layers = []
    for name, step in assigned.items():
        out_features, in_features = shapes[sources[name]]
        scheme = _fit_scheme(name, in_features, step)
        shape = (out_features, in_features)
        layers.append(LayerPlan(name=name, source=sources[name], shape=shape, step=step, scheme=scheme))
    notes += _fallback_notes(layers)
    unties_head = any(layer.name == HEAD and layer.source != f"{HEAD}.weight" for layer in layers)
    if unties_head:
        num_weights = math.prod(shapes[sources[HEAD]])
        notes.append(f"{HEAD} is tied: it gets its own copy of {num_weights:,} quantized weights, the embedding stays")
    if recipe.kv_cache is not None:
        notes.append(recipe.kv_cache.note(model_config(checkpoint.config)))
    untied = {f"{HEAD}.weight"} - source_names
    replaced = {layer.source for layer in layers if layer.source == f"{layer.name}.weight"}
    return CompressionPlan(
        recipe=recipe,
        config=checkpoint.config,
        layers=tuple(layers),
        dense={name: shape for name, shape in shapes.items() if name not in replaced},
        dtype=_choose_dtype(dtype, checkpoint),
        num_parameters=sum(math.prod(shape) for name, shape in shapes.items() if name not in untied),
        unties_head=unties_head,
        notes=tuple(notes),
    )


def _linear_sources(shapes: dict[str, tuple[int, ...]], names_head: bool) -> dict[str, str]:
    """Layer name -> tensor of every matrix a recipe can match.

    A tied head is made from the embedding, and only for a recipe that says `lm_head`: untying costs a second matrix,
    which a pattern such as `re:.*` should not decide.
    """
    sources = {
        name.removesuffix(".weight"): name
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and name != f"{EMBEDDING}.weight"
    }
    if not sources:
        raise ModelFileError("the model has no weight matrices to compress")
    if names_head and HEAD not in sources and f"{EMBEDDING}.weight" in shapes:
        sources[HEAD] = f"{EMBEDDING}.weight"
    return sources


def _fit_scheme(name: str, in_features: int, step: Step) -> Scheme:
    """The step's scheme with a group size that divides this layer's rows."""
    if step.method == "autoround" and name == HEAD:
        raise PowertrainError(f"{name}: autoround rounds the matrices of a block together; give the head rtn or gptq")
    if isinstance(step.scheme, FloatScheme):
        if step.scheme.strategy is None and in_features % (step.scheme.group_size or 1):
            own = f"{step.scheme_name} has groups of {step.scheme.group_size} inputs"
            raise PowertrainError(f"{name}: {own}, which do not divide {in_features}; FP8_DYNAMIC has none")
        return step.scheme
    size = step.scheme.group_size
    if size is not None and step.group_size_fallback == "nearest" and (in_features % size or size % GROUP_SIZE_STEP):
        return replace(step.scheme, group_size=nearest_group_size(in_features, size))
    try:
        check_group_size(name, in_features, size)
    except PowertrainError as error:
        raise PowertrainError(f"{error}; `group_size_fallback: nearest` in a recipe takes the nearest") from None
    return step.scheme


def _fallback_notes(layers: Sequence[LayerPlan]) -> list[str]:
    """One line per kind of layer that got another group size than its step asks for."""
    names: dict[str, list[str]] = {}
    for layer in layers:
        asked, given = layer.step.scheme.group_size, layer.scheme.group_size
        if asked != given:
            what = f"group_size {asked} does not divide {layer.shape[1]}, {given or CHANNEL} is used"
            names.setdefault(what, []).append(layer.name)
    return [f"{what}: {len(found)} matrices (e.g. {found[0]})" for what, found in names.items()]


def _choose_dtype(dtype: str, checkpoint: Checkpoint) -> torch.dtype:
    """`auto` keeps a half-precision source's dtype and stores any other as bfloat16.

    bfloat16 because the engine's integer kernels take their scales in it, so that what was measured is what runs; and
    it costs nothing: rounding the scales first leaves the weight error of 4 and 8 bits where it was (within 0.1 %),
    and the dense tensors lose 1e-6 of their energy where 8-bit weights lose 7e-5.
    """
    if dtype == "auto":
        stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
        return torch.float16 if stored.removeprefix("torch.") == "float16" else torch.bfloat16
    if dtype not in DTYPES:
        raise PowertrainError(f"dtype {dtype!r} is unknown; the known ones are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def target_groups(plan: CompressionPlan) -> tuple[list[tuple[Scheme, list[str]]], list[str]]:
    """(scheme, targets) pairs and the ignore list, in compressed-tensors' words and as few as say it exactly.

    One scheme for every matrix of the decoder is the target `Linear`; a scheme that all layers of one kind share is a
    pattern; anything else is named layer by layer.
    """
    linears = [layer.name for layer in plan.layers]
    linears += [name.removesuffix(".weight") for name, shape in plan.dense.items() if _is_linear(name, shape)]
    scheme_of = {layer.name: layer.scheme for layer in plan.layers}
    ignore = [name for name in linears if name not in scheme_of]
    if HEAD not in linears:
        ignore.append(HEAD)
    schemes = list(dict.fromkeys(scheme_of.values()))
    if len(schemes) == 1 and ignore in ([], [HEAD]):
        return [(schemes[0], ["Linear"])], ignore
    return [(scheme, _targets(scheme, scheme_of, linears)) for scheme in schemes], ignore


def _is_linear(name: str, shape: Sequence[int]) -> bool:
    return name.endswith(".weight") and len(shape) == 2 and name != f"{EMBEDDING}.weight"


def _targets(scheme: Scheme, scheme_of: dict[str, Scheme], linears: Sequence[str]) -> list[str]:
    targets: list[str] = []
    for name in (name for name, own in scheme_of.items() if own == scheme):
        kind = name.rsplit(".", 1)[-1]
        of_kind = [other for other in linears if other.rsplit(".", 1)[-1] == kind]
        shared = name != HEAD and all(scheme_of.get(other) == scheme for other in of_kind)
        targets.append(f"re:.*\\.{kind}$" if shared else name)
    return list(dict.fromkeys(targets))
