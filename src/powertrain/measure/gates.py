"""Limits on an evaluation, for continuous integration: held against the measured value, never a bound of its interval.

An interval says how sure the value is; it is printed beside the verdict, and whether the limit lies within it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from powertrain.measure.evaluate import Evaluation
from powertrain.measure.tasks import TaskResult
from powertrain.types import PowertrainError

_STATISTICS = {"max-kl": "kl_mean", "min-top1": "top1_agreement", "max-ppl-ratio": "ppl_ratio"}
FLIPS = "max-flips"
NAMES = (*_STATISTICS, FLIPS)


@dataclass(frozen=True, slots=True)
class Gate:
    """`max-kl` in nats per token, `min-top1` and `max-flips` shares in [0, 1], `max-ppl-ratio` a ratio."""

    name: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name}={self.limit:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One value held against a gate; it may equal the limit."""

    gate: Gate
    of: str
    value: float
    interval: tuple[float, float] | None

    @property
    def is_met(self) -> bool:
        is_minimum = self.gate.name.startswith("min-")
        return self.value >= self.gate.limit if is_minimum else self.value <= self.gate.limit

    def __str__(self) -> str:
        text = f"gate {self.gate} {'holds' if self.is_met else 'is broken'}: {self.of} is {self.value:.5g}"
        if self.interval is None:
            return text
        low, high = self.interval
        close = "; the limit lies within it" if low <= self.gate.limit <= high else ""
        return f"{text}, 95 % interval [{low:.5g}, {high:.5g}]{close}"

    def to_dict(self) -> dict[str, Any]:
        interval = None if self.interval is None else list(self.interval)
        gate = {"name": self.gate.name, "limit": self.gate.limit}
        return {**gate, "of": self.of, "value": self.value, "interval": interval, "is_met": self.is_met}


def parse_gates(texts: Sequence[str]) -> list[Gate]:
    """`max-kl=0.05` and the like. Raises `PowertrainError` for an unknown name or a limit that is no number."""
    gates = []
    for text in texts:
        name, _, value = text.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        is_share = name in ("min-top1", FLIPS)
        if name not in NAMES or not math.isfinite(limit) or limit < 0 or (is_share and limit > 1):
            known = ", ".join(NAMES)
            raise PowertrainError(
                f"--gate must be a name and a limit like max-kl=0.05, got {text!r}; names: {known}; "
                "min-top1 and max-flips are shares from 0 to 1"
            )
        gates.append(Gate(name, limit))
    return gates


def check_gates_can_be_held(gates: Sequence[Gate], *, has_data: bool, has_tasks: bool) -> None:
    """Raises `PowertrainError` for a gate on what will not be measured, before anything is."""
    for gate in gates:
        if gate.name == FLIPS and not has_tasks:
            raise PowertrainError(f"--gate {gate} needs a --task")
        if gate.name != FLIPS and not has_data:
            raise PowertrainError(f"--gate {gate} needs --data other than none")


def hold(gates: Sequence[Gate], evaluation: Evaluation | None, tasks: Sequence[TaskResult]) -> list[Verdict]:
    """Every gate against what was measured; `max-flips` against each task and each of its ways to choose."""
    return [verdict for gate in gates for verdict in _hold(gate, evaluation, tasks)]


def _hold(gate: Gate, evaluation: Evaluation | None, tasks: Sequence[TaskResult]) -> Iterator[Verdict]:
    if gate.name != FLIPS:
        if evaluation is not None:
            statistic = _STATISTICS[gate.name]
            interval = evaluation.intervals.get(statistic)
            yield Verdict(gate=gate, of=statistic, value=getattr(evaluation, statistic), interval=interval)
        return
    for task in tasks:
        for name, score in task.scores.items():
            yield Verdict(gate=gate, of=f"{task.name} {name} flips", value=score.flips, interval=score.flips_interval)
