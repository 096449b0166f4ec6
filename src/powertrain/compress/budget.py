"""Bits where they matter: the format of every layer so that a model of a given size diverges least, as a recipe.

Candidates are (unit, format): the matrices that multiply one input, in each of the formats whose groups divide their
rows, or dense. A candidate costs the bytes it is stored in and loses what `compress/sensitivity.py` says; losses are
taken to add up. Which unit gets what is a knapsack (`compress/knapsack.py`), solved at all sizes at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.compress.calibrate import CalibrationData, calibration_set
from powertrain.compress.knapsack import Frontier, solve
from powertrain.compress.plain_decoder import LINEARS_OF_STEP
from powertrain.compress.plan import CompressionPlan, LayerPlan, make_plan
from powertrain.compress.quantize import dividing_group_sizes
from powertrain.compress.recipe import CHANNEL, HEAD, Recipe, Step, load_recipe
from powertrain.compress.sensitivity import Losses, Progress, Unit, estimated, measured
from powertrain.types import PowertrainError, QuantScheme

FORMATS = (
    *("W2A16:32", "W2A16:64", "W3A16:32", "W3A16:64", "W4A16:32", "W4A16:64", "W4A16:128"),
    *("W5A16:64", "W6A16:64", "W8A16:channel"),
)
"""Offered where their groups divide a row."""

NUM_SAMPLES, LENGTH = 16, 256
NUM_MARKS = 12
"""Lines of the frontier's table."""

Sensitivity: TypeAlias = Literal["fisher", "kl"]
SENSITIVITIES: tuple[Sensitivity, ...] = ("fisher", "kl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the recipe must keep to, one of: bytes of all tensors, bits per weight over all weights, KL in nats."""

    nbytes: int | None = None
    bits: float | None = None
    kl: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.nbytes, self.bits, self.kl) if value is not None]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise PowertrainError("a budget has one target above zero: bytes, bits per weight, or KL")

    def point(self, frontier: Frontier, fixed: int, num_parameters: int) -> int:
        """Where on the frontier it lies. Raises `PowertrainError` with what is possible where it is beyond that."""
        if self.kl is not None:
            cheapest = frontier.cheapest(self.kl)
            if cheapest is None:
                raise PowertrainError(
                    f"no format has a KL of {self.kl:g}: {float(frontier.losses[-1]):.3g} is the least"
                )
            return cheapest
        limit = self.nbytes if self.nbytes is not None else (self.bits or 0.0) * num_parameters / 8
        within = frontier.within(limit - fixed)
        if within is None:
            least = fixed + int(frontier.costs[0])
            raise PowertrainError(
                f"{limit:,.0f} bytes are too few: these formats take {least:,} at least, "
                f"{8 * least / num_parameters:.2f} bits per weight ({fixed:,} bytes are no layer's)"
            )
        return within


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point of the frontier: `bits_of_kind` is the mean over the weights of q/k/v, o, gate/up, down and the head."""

    nbytes: int
    bits_per_weight: float
    kl: float
    bits_of_kind: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A recipe that keeps to a target, its point of the frontier, and others between the least and the most bits."""

    recipe: Recipe
    chosen: Mark
    frontier: tuple[Mark, ...]
    calibration: Mapping[str, Any]
    sensitivity: Sensitivity

    def to_dict(self) -> dict[str, Any]:
        def plain(mark: Mark) -> dict[str, Any]:
            return {field: getattr(mark, field) for field in Mark.__dataclass_fields__}

        return {
            "recipe": self.recipe.to_dict(),
            "sensitivity": self.sensitivity,
            "calibration": dict(self.calibration),
            "chosen": plain(self.chosen),
            "frontier": [plain(mark) for mark in self.frontier],
        }

    def table(self) -> str:
        """The frontier, a line per mark, and the chosen point marked by a star."""
        kinds = list(self.chosen.bits_of_kind)
        marks = sorted({mark.nbytes: mark for mark in (*self.frontier, self.chosen)}.items())
        lines = [f"  {'bits':>6}  {'bytes':>15}  {'KL predicted':>12}  " + "  ".join(f"{kind:>8}" for kind in kinds)]
        for nbytes, mark in marks:
            star = "*" if nbytes == self.chosen.nbytes else " "
            bits = "  ".join(f"{mark.bits_of_kind[kind]:8.2f}" for kind in kinds)
            lines.append(f"{star} {mark.bits_per_weight:6.3f}  {nbytes:>15,}  {mark.kl:12.6f}  {bits}")
        return "\n".join(lines)

    def yaml(self) -> str:
        """The recipe as a file for `powertrain compress`."""
        import yaml

        keys = ("match", "method", "scheme", "group_size", "observer")
        steps = [{key: step.to_dict()[key] for key in keys} for step in self.recipe.steps]
        about = f"# {self.chosen.nbytes} bytes, {self.chosen.bits_per_weight:.3f} bits per weight over all of them\n"
        about += f"# predicted KL: {self.chosen.kl:.6f} nats per token, each layer rounded to nearest\n"
        return about + str(yaml.safe_dump({"name": self.recipe.name, "steps": steps}, sort_keys=False))


def budget(
    model: str | Path,
    target: Target,
    *,
    calibration: CalibrationData,
    formats: Sequence[str] = FORMATS,
    sensitivity: Sensitivity = "fisher",
    method: str = "rtn",
    dtype: str = "auto",
    device: str = "auto",
    num_samples: int = NUM_SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
    progress: Progress | None = None,
) -> Budget:
    """The recipe with the least predicted divergence within `target`; `method` is what its steps will round by.

    formats: `SCHEME:GROUP_SIZE` or `SCHEME:channel`; a unit is offered those that divide its rows, and to stay dense.
    Raises `PowertrainError` for an unknown format, one with activations or floats, or a target that none reaches.
    """
    if sensitivity not in SENSITIVITIES:
        raise PowertrainError(f"sensitivity {sensitivity!r} is unknown; the known ones are {', '.join(SENSITIVITIES)}")
    checkpoint = open_checkpoint(resolve_model(model))
    templates = _templates(formats, method)
    plan = _base_plan(checkpoint, dtype)
    units = _units(plan, templates)
    samples = calibration_set(calibration, checkpoint, num_samples=num_samples, length=length, seed=seed)
    place = _place(device)
    if sensitivity == "kl":
        losses = measured(checkpoint, units, samples.token_ids, device=place, progress=progress)
    else:
        losses = estimated(checkpoint, units, samples.token_ids, device=place, seed=seed, progress=progress)
    solver = Allocation(plan, units, losses)
    point = target.point(solver.frontier, solver.fixed, plan.num_parameters)
    chosen = solver.mark(point)
    return Budget(
        recipe=solver.recipe(point, templates, f"budget-{chosen.bits_per_weight:.2f}-bits"),
        chosen=chosen,
        frontier=tuple(solver.mark(at) for at in solver.spread(NUM_MARKS)),
        calibration=samples.to_dict(),
        sensitivity=sensitivity,
    )


def _place(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise PowertrainError(f"device {device!r}: give auto, cpu, or cuda where torch sees one")
    return torch.device(device)


class Allocation:
    """Costs and losses of every unit's choices, the last of which is to stay dense, and the frontier over them."""

    def __init__(self, plan: CompressionPlan, units: Sequence[Unit], losses: Losses) -> None:
        self._plan, self._units = plan, units
        self._layers = {layer.name: layer for layer in plan.layers}
        self.fixed = sum(math.prod(shape) for shape in plan.dense.values()) * plan.dtype.itemsize
        choices = [
            [*((self._nbytes(unit, scheme), own[scheme]) for scheme in unit.formats), (self._nbytes(unit, None), 0.0)]
            for unit, own in zip(units, losses, strict=True)
        ]
        self.frontier = solve(choices)

    def _nbytes(self, unit: Unit, scheme: QuantScheme | None) -> int:
        """What the unit's matrices are stored in, as the compression's plan counts them."""
        itemsize, layers = self._plan.dtype.itemsize, [self._layers[name] for name in unit.layers]
        if scheme is None:
            return sum(math.prod(layer.shape) for layer in layers) * itemsize
        planned = [replace(layer, scheme=scheme) for layer in layers]
        return sum(layer.nbytes + layer.parameter_bytes(itemsize) for layer in planned)

    def schemes(self, point: int) -> list[QuantScheme | None]:
        """Of each unit at a point of the frontier; None: dense."""
        return [(*unit.formats, None)[at] for unit, at in zip(self._units, self.frontier.choices(point), strict=True)]

    def mark(self, point: int) -> Mark:
        nbytes = self.fixed + int(self.frontier.costs[point])
        sizes: dict[str, list[int]] = {}
        for unit, scheme in zip(self._units, self.schemes(point), strict=True):
            weights = sum(math.prod(self._layers[name].shape) for name in unit.layers)
            of_kind = sizes.setdefault(_kind(unit), [0, 0])
            of_kind[0] += 8 * self._nbytes(unit, scheme)
            of_kind[1] += weights
        return Mark(
            nbytes=nbytes,
            bits_per_weight=8 * nbytes / self._plan.num_parameters,
            kl=float(self.frontier.losses[point]),
            bits_of_kind={kind: bits / weights for kind, (bits, weights) in sizes.items()},
        )

    def spread(self, count: int) -> list[int]:
        """Points at equal steps of cost, from the least to all units in their widest format that is not dense."""
        widest = sum(max(self._nbytes(unit, scheme) for scheme in unit.formats) for unit in self._units if unit.formats)
        least = int(self.frontier.costs[0])
        found = (self.frontier.within(cost) for cost in np.linspace(least, max(least, widest), count))
        return sorted({point for point in found if point is not None})

    def recipe(self, point: int, templates: Mapping[QuantScheme, Step], name: str) -> Recipe:
        """One step per format, which names its layers."""
        chosen = self.schemes(point)
        steps = []
        for scheme, template in sorted(templates.items(), key=lambda item: item[0].num_bits):
            found = [unit.layers for unit, own in zip(self._units, chosen, strict=True) if own == scheme]
            if found:
                steps.append(replace(template, match=tuple(layer for layers in found for layer in layers)))
        if not steps:
            raise PowertrainError("the target leaves every layer dense: there is nothing to compress; give a lower one")
        return Recipe(name=name, steps=tuple(steps))


def _templates(formats: Sequence[str], method: str) -> dict[QuantScheme, Step]:
    """A step without layers for each format."""
    templates: dict[QuantScheme, Step] = {}
    for text in formats:
        scheme_name, _, size = text.partition(":")
        if size != CHANNEL and not size.isdigit():
            raise PowertrainError(f"format {text!r}: give SCHEME:GROUP_SIZE, such as W4A16:64 or W8A16:{CHANNEL}")
        entries = {"match": "Linear", "method": method, "scheme": scheme_name, "observer": "mse"}
        [step] = load_recipe({"steps": [{**entries, "group_size": int(size) if size.isdigit() else size}]}).steps
        if not isinstance(step.scheme, QuantScheme) or step.scheme.activation_bits is not None:
            raise PowertrainError(f"format {text!r}: a budget chooses integer formats of weights alone, such as W4A16")
        templates[step.scheme] = step
    if not templates:
        raise PowertrainError("a budget needs at least one format, such as W4A16:64")
    return templates


def _base_plan(checkpoint: Checkpoint, dtype: str) -> CompressionPlan:
    """A plan that rounds every matrix, for names, shapes and what stays. A tied head costs nothing while it stays."""
    match = ["Linear", *([HEAD] if f"{HEAD}.weight" in checkpoint.names() else [])]
    return make_plan(checkpoint, load_recipe({"steps": [{"match": match, "scheme": "W8A16"}]}), dtype)


def _units(plan: CompressionPlan, templates: Mapping[QuantScheme, Step]) -> list[Unit]:
    """Layers that share an input go together: runtimes multiply by them as one."""
    together: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        parts = layer.name.split(".")
        block, within = ".".join(parts[:3]), ".".join(parts[3:])
        step = next((str(step) for step, names in LINEARS_OF_STEP.items() if within in names), within)
        together.setdefault(f"{block}.{step}", []).append(layer)
    units = []
    for layers in together.values():
        widths = {layer.shape[1] for layer in layers}
        formats = [s for s in templates if all(_divides(s.group_size, width) for width in widths)]
        units.append(Unit(tuple(layer.name for layer in layers), tuple(formats)))
    if not any(unit.formats for unit in units):
        raise PowertrainError(f"none of the formats' group sizes divides the rows of {units[0].layers[0]}")
    return units


def _divides(group_size: int | None, width: int) -> bool:
    return group_size in (None, width) or group_size in dividing_group_sizes(width)


def _kind(unit: Unit) -> str:
    names = [layer.rsplit(".", 1)[-1].removesuffix("_proj") for layer in unit.layers]
    return "/".join(names)
