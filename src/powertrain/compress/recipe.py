"""What to do to which layer: an ordered list of steps, from YAML, a dictionary, a preset name or Python."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from powertrain.checkpoint.float_presets import FLOAT_PRESETS, FloatScheme
from powertrain.compress import sign_rounding
from powertrain.compress.awq import AwqStep
from powertrain.compress.dither import DitherStep
from powertrain.compress.gptq import MAX_DAMPING, GptqOptions
from powertrain.compress.kv_cache import KV_CACHE, KVCacheStep
from powertrain.compress.model_step import ModelStep
from powertrain.compress.prune_depth import PruneDepthStep
from powertrain.compress.prune_width import PruneWidthStep
from powertrain.compress.ranges import OBSERVERS, Observer
from powertrain.compress.recipe_fields import one_of, refuse_unknown_keys
from powertrain.compress.rotation import RotateStep
from powertrain.compress.sign_rounding import SignRoundingOptions
from powertrain.compress.smoothquant import SmoothQuantStep
from powertrain.compress.sparsify import SparsifyStep
from powertrain.types import PowertrainError, QuantScheme

CHANNEL = "channel"
"""The group size that means one group per output row."""

HEAD = "lm_head"

Scheme = QuantScheme | FloatScheme

SCHEMES: dict[str, Scheme] = {
    "W4A16": QuantScheme(num_bits=4, group_size=64),
    "W4A16_ASYM": QuantScheme(num_bits=4, group_size=64, symmetric=False),
    "W2A16": QuantScheme(num_bits=2, group_size=64),
    "W2A16_ASYM": QuantScheme(num_bits=2, group_size=64, symmetric=False),
    "W3A16": QuantScheme(num_bits=3, group_size=64),
    "W3A16_ASYM": QuantScheme(num_bits=3, group_size=64, symmetric=False),
    "W5A16": QuantScheme(num_bits=5, group_size=64),
    "W6A16": QuantScheme(num_bits=6, group_size=64),
    "W8A16": QuantScheme(num_bits=8),
    "W8A16_ASYM": QuantScheme(num_bits=8, symmetric=False),
    "W4A8": QuantScheme(num_bits=4, group_size=64, activation_bits=8),
    "W8A8": QuantScheme(num_bits=8, activation_bits=8),
    **{preset: FloatScheme(preset) for preset in FLOAT_PRESETS},
}
"""Scheme names of compressed-tensors with the group size used when a step gives none.

Theirs is 128 below 8 bits, which does not divide the rows of many small models (576 = 9 * 64); so it is 64 here.
"""

METHODS = ("rtn", "gptq", "autoround")
FLOAT_METHODS = ("rtn", "gptq")
"""Those that round to 8-bit and 4-bit floats too."""


MODEL_STEPS: dict[str, Callable[[Mapping[str, Any], str], ModelStep]] = {
    "rotate": RotateStep.parse,
    "dither": DitherStep.parse,
    "awq": AwqStep.parse,
    "smoothquant": SmoothQuantStep.parse,
    "prune_depth": PruneDepthStep.parse,
    "prune_width": PruneWidthStep.parse,
    "sparsify": SparsifyStep.parse,
}
"""Methods that change the whole model: (the step's entries without `method`, where it stands) -> the step."""

_MODEL_PRESETS: dict[str, list[dict[str, Any]]] = {
    "rotated": [{"method": "rotate"}],
    "dithered": [{"method": "dither"}],
    "prune-depth-third": [{"method": "prune_depth", "share": 1 / 3}],
    "draft": [{"method": "prune_depth", "share": 0.8, "choose": "spread"}],
}
PRESETS = (*SCHEMES, *_MODEL_PRESETS)

_STEP_KEYS = ("match", "ignore", "method", "scheme", "group_size", "group_size_fallback", "observer")
_GPTQ_KEYS = ("actorder", "dampening_frac", "correction")
_METHOD_KEYS = {"rtn": (), "gptq": _GPTQ_KEYS, "autoround": sign_rounding.KEYS}
_RECIPE_KEYS = ("name", "steps")


def shared_scale(scheme: Scheme) -> int | str:
    """Which weights share a scale, as recipes say it: so many of a row, `channel` or, of the whole matrix, `tensor`."""
    if isinstance(scheme, FloatScheme) and scheme.strategy == "tensor":
        return "tensor"
    return scheme.group_size or CHANNEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One rule: the layers whose name matches get this method and scheme.

    `match` and `ignore` hold layer names (`model.layers.0.mlp.up_proj`), `re:` patterns matched from the start of the
    name, or `Linear` for every matrix of the decoder layers. `group_size_fallback` "nearest" takes, where the group
    size does not divide a row, the nearest one that does; "refuse" stops with an error. `observer` says how the range
    of a group is chosen (`compress/ranges.py`).
    """

    match: tuple[str, ...]
    scheme_name: str
    scheme: Scheme
    method: Literal["rtn", "gptq", "autoround"] = "rtn"
    ignore: tuple[str, ...] = ()
    group_size_fallback: Literal["refuse", "nearest"] = "refuse"
    observer: Observer = "minmax"
    actorder: Literal["static", "none"] = "static"
    dampening_frac: float = 0.01
    correction: Literal["none", "asymmetric"] = "none"
    autoround: SignRoundingOptions = field(default_factory=SignRoundingOptions)

    @property
    def is_calibrated(self) -> bool:
        """Whether the method looks at activations, or the scheme has a scale for them in the file."""
        return self.method != "rtn" or (isinstance(self.scheme, FloatScheme) and self.scheme.has_input_scale)

    @property
    def wants_original(self) -> bool:
        """Whether the method looks at the activations before compression too."""
        if self.method == "autoround":
            return self.autoround.target == "original"
        return self.correction == "asymmetric"

    def gptq_options(self) -> GptqOptions:
        return GptqOptions(
            damping_frac=self.dampening_frac,
            orders_columns=self.actorder == "static",
            correction=0.25 if self.correction == "asymmetric" else 0.0,
            observer=self.observer,
        )

    def matches(self, layer: str) -> bool:
        return any(_matches(p, layer) for p in self.match) and not any(_matches(p, layer) for p in self.ignore)

    def to_dict(self) -> dict[str, Any]:
        """The step as a recipe file would have it, every default written out."""
        return {
            "match": list(self.match),
            "ignore": list(self.ignore),
            "method": self.method,
            "scheme": self.scheme_name,
            # floats have groups of their own, which a recipe cannot choose
            **({} if isinstance(self.scheme, FloatScheme) else {"group_size": self.scheme.group_size or CHANNEL}),
            "group_size_fallback": self.group_size_fallback,
            "observer": self.observer,
            **({key: getattr(self, key) for key in _GPTQ_KEYS} if self.method == "gptq" else {}),
            **(self.autoround.to_dict() if self.method == "autoround" else {}),
        }


AnyStep: TypeAlias = Step | ModelStep | KVCacheStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Ordered steps: `model_steps` change the whole model one after the other, then `steps` round its matrices.

    A layer that two steps would round is an error, one that none matches stays as it is. `kv_cache` comes last.
    """

    name: str
    steps: tuple[Step, ...] = ()
    model_steps: tuple[ModelStep, ...] = ()
    kv_cache: KVCacheStep | None = None

    @property
    def all_steps(self) -> list[AnyStep]:
        return [*self.model_steps, *self.steps, *([] if self.kv_cache is None else [self.kv_cache])]

    @property
    def is_calibrated(self) -> bool:
        """Whether some step looks at activations."""
        return any(step.is_calibrated for step in self.all_steps)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "steps": [step.to_dict() for step in self.all_steps]}

    def assign(self, layers: Sequence[str]) -> dict[str, Step]:
        """Which step each layer gets (layers that none matches are absent).

        Raises `PowertrainError` if a layer is matched twice, naming both steps, or if a step matches nothing.
        """
        chosen: dict[str, int] = {}
        first_number = len(self.model_steps)
        for number, step in enumerate(self.steps, first_number):
            matched = [layer for layer in layers if step.matches(layer)]
            if not matched:
                examples = ", ".join(layers[:3])
                raise PowertrainError(f"{_where(number)}: match {_quoted(step.match)} fits no layer (e.g. {examples})")
            for layer in matched:
                if layer in chosen:
                    earlier = self.steps[chosen[layer] - first_number]
                    first = f"steps[{chosen[layer]}] ({_quoted(earlier.match)})"
                    second = f"steps[{number}] ({_quoted(step.match)})"
                    raise PowertrainError(f"{layer} is matched by {first} and by {second}; add it to one step's ignore")
                chosen[layer] = number
        return {layer: self.steps[chosen[layer] - first_number] for layer in layers if layer in chosen}


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe from a preset name (`W4A16`), a YAML or JSON file, a dictionary, or itself.

    Raises `PowertrainError` naming the unknown preset, key, method or scheme, and the file it stands in.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _parse_recipe(source, "recipe")
    if str(source) in SCHEMES:
        return _parse_recipe({"steps": [{"match": "Linear", "scheme": str(source)}]}, str(source))
    if str(source) in _MODEL_PRESETS:
        return _parse_recipe({"steps": _MODEL_PRESETS[str(source)]}, str(source))
    path = Path(source)
    if not path.is_file():
        presets = ", ".join(PRESETS)
        raise PowertrainError(f"recipe {str(source)!r} is neither a file nor a preset; the presets are {presets}")
    return _parse_recipe(_read_yaml(path), path.stem, where=str(path))


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PowertrainError(f"{path}: not a readable recipe: {reason}") from None
    if not isinstance(value, Mapping):
        raise PowertrainError(f"{path}: a recipe is a mapping with `steps:`, found {type(value).__name__}")
    return value


def _parse_recipe(value: Mapping[str, Any], name: str, where: str = "recipe") -> Recipe:
    refuse_unknown_keys(value, _RECIPE_KEYS, where)
    steps = value.get("steps")
    if not isinstance(steps, Sequence) or isinstance(steps, str) or not steps:
        raise PowertrainError(f"{where}: steps must be a list of at least one step")
    model_steps: list[ModelStep] = []
    layer_steps: list[Step] = []
    kv_cache: KVCacheStep | None = None
    for number, step in enumerate(steps):
        parsed = _parse_step(step, _where(number, where))
        if kv_cache is not None:
            raise PowertrainError(
                f"{_where(number - 1, where)}: {KV_CACHE} measures what all others leave: put it last"
            )
        if isinstance(parsed, KVCacheStep):
            kv_cache = parsed
            continue
        if isinstance(parsed, Step):
            layer_steps.append(parsed)
            continue
        if layer_steps:
            method = parsed.to_dict()["method"]
            raise PowertrainError(f"{_where(number, where)}: {method} changes the model: put it before what rounds it")
        model_steps.append(parsed)
    name = str(value.get("name", name))
    return Recipe(name=name, steps=tuple(layer_steps), model_steps=tuple(model_steps), kv_cache=kv_cache)


def _parse_step(value: Any, where: str) -> AnyStep:
    if isinstance(value, Step):
        return value
    if not isinstance(value, Mapping):
        raise PowertrainError(f"{where}: a step is a mapping like {{match: Linear, scheme: W4A16}}, got {value!r}")
    method = one_of(value.get("method", "rtn"), (*METHODS, *MODEL_STEPS, KV_CACHE), f"{where}.method")
    if method in MODEL_STEPS or method == KV_CACHE:
        parse = KVCacheStep.parse if method == KV_CACHE else MODEL_STEPS[method]
        return parse({key: entry for key, entry in value.items() if key != "method"}, where)
    refuse_unknown_keys(value, (*_STEP_KEYS, *_METHOD_KEYS[method]), where)
    scheme_name = one_of(value.get("scheme"), tuple(SCHEMES), f"{where}.scheme")
    fallback = one_of(value.get("group_size_fallback", "refuse"), ("refuse", "nearest"), f"{where}.group_size_fallback")
    observer = one_of(value.get("observer", "minmax" if method == "rtn" else "mse"), OBSERVERS, f"{where}.observer")
    if observer == "weighted" and method != "gptq":
        raise PowertrainError(
            f"{where}.observer: weighted asks what each input is worth, which gptq alone knows; use mse"
        )
    return Step(
        match=_patterns(value.get("match") or None, f"{where}.match"),
        ignore=_patterns(value.get("ignore", []), f"{where}.ignore"),
        method=method,  # type: ignore[arg-type]
        scheme_name=scheme_name,
        scheme=_scheme(scheme_name, value, where),
        group_size_fallback="nearest" if fallback == "nearest" else "refuse",
        observer=observer,  # type: ignore[arg-type]
        autoround=SignRoundingOptions.parse(value, observer, where),  # type: ignore[arg-type]
        **_gptq_fields(value, where),
    )


def _gptq_fields(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    fraction = value.get("dampening_frac", 0.01)
    if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 < fraction <= MAX_DAMPING:
        raise PowertrainError(f"{where}.dampening_frac must be in (0, {MAX_DAMPING:g}], got {fraction!r}")
    return {
        "dampening_frac": float(fraction),
        "actorder": one_of(value.get("actorder", "static"), ("static", "none"), f"{where}.actorder"),
        "correction": one_of(value.get("correction", "none"), ("none", "asymmetric"), f"{where}.correction"),
    }


def _scheme(name: str, step: Mapping[str, Any], where: str) -> Scheme:
    scheme = SCHEMES[name]
    if isinstance(scheme, FloatScheme):
        if "group_size" in step:
            raise PowertrainError(f"{where}.group_size: {name} has groups of its own; leave it out")
        method = step.get("method", "rtn")
        if method not in FLOAT_METHODS:
            others = " and ".join(FLOAT_METHODS)
            raise PowertrainError(f"{where}.method: {method} rounds to integers, {name} has floats; {others} can")
        return scheme
    if "group_size" not in step:
        return scheme
    size = step["group_size"]
    if size == CHANNEL:
        return replace(scheme, group_size=None)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise PowertrainError(f"{where}.group_size must be a positive integer or `{CHANNEL}`, got {size!r}")
    return replace(scheme, group_size=size)


def _patterns(value: Any, where: str) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) and p for p in patterns):
        raise PowertrainError(
            f"{where} must be a layer name, `re:` pattern or `Linear`, or a list of them; got {value!r}"
        )
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise PowertrainError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
    return tuple(patterns)


def _matches(pattern: str, layer: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], layer) is not None
    return layer == pattern or (pattern == "Linear" and layer != HEAD)


def _where(number: int, recipe: str = "recipe") -> str:
    return f"{recipe}: steps[{number}]"


def _quoted(patterns: Sequence[str]) -> str:
    return ", ".join(repr(pattern) for pattern in patterns)
