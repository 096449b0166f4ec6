"""The decision, apart from all measuring: which candidate wins, why the others do not, what would help if none does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from powertrain.optimize.space import Limits, Measured


@dataclass(frozen=True, slots=True)
class Relaxation:
    """Limits that, set to these values and the others kept, admit `candidate`."""

    limits: Mapping[str, float]
    candidate: str

    def __str__(self) -> str:
        parts = [f"{_QUANTITIES[name].flag} {_QUANTITIES[name].show(value)}" for name, value in self.limits.items()]
        return f"{' and '.join(parts)} would admit {self.candidate}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The winner or None; per rejected candidate its reasons; if nothing qualifies, what to relax, nearest first."""

    winner: Measured | None
    rejections: Mapping[str, tuple[str, ...]]
    relaxations: tuple[Relaxation, ...] = ()


@dataclass(frozen=True, slots=True)
class _Quantity:
    flag: str
    label: str
    of: Callable[[Measured], float | None]
    show: Callable[[float], str]


def show_kl(value: float) -> str:
    """KL with three significant digits, never as a power of ten."""
    return f"{value:.{max(3, 2 - math.floor(math.log10(value)))}f}".rstrip("0").rstrip(".") if value > 0 else "0"


def show_ms(value: float) -> str:
    """Milliseconds with three significant digits or all whole ones."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def show_bytes(value: float) -> str:
    """Bytes in MB, as `--max-memory` takes them."""
    return f"{value / 1e6:.0f}MB" if value >= 1e7 else f"{value:.0f}"


_QUANTITIES: dict[str, _Quantity] = {
    "max_kl": _Quantity("--max-kl", "KL", lambda m: m.fidelity.worst_kl if m.fidelity else None, show_kl),
    "tpot_ms": _Quantity("--tpot-ms", "TPOT", lambda m: m.speed.tpot_ms if m.speed else None, show_ms),
    "ttft_ms": _Quantity("--ttft-ms", "TTFT", lambda m: m.speed.ttft_ms if m.speed else None, show_ms),
    "max_memory": _Quantity("--max-memory", "memory", lambda m: m.speed.memory_bytes if m.speed else None, show_bytes),
}


def choose(candidates: Sequence[Measured], limits: Limits) -> Choice:
    """Drop what breaks a limit and take the highest throughput of the rest (on a tie, the lower KL).

    A candidate whose speed is unknown cannot win. With no winner, `relaxations` holds for each limit the smallest
    change that alone admits some candidate, and the set of changes with the smallest largest factor if that is smaller.
    """
    rejections: dict[str, tuple[str, ...]] = {}
    qualified: list[Measured] = []
    for candidate in candidates:
        reasons = reasons_against(candidate, limits)
        if reasons:
            rejections[candidate.name] = reasons
        else:
            qualified.append(candidate)
    if not qualified:
        return Choice(winner=None, rejections=rejections, relaxations=_relaxations(candidates, limits))
    winner = max(qualified, key=_merit)
    for candidate in qualified:
        if candidate is not winner:
            rejections[candidate.name] = (_slower(candidate, winner),)
    return Choice(winner=winner, rejections=rejections)


def reasons_against(candidate: Measured, limits: Limits) -> tuple[str, ...]:
    """Why this candidate cannot win under `limits`, each reason with its number; empty if it can."""
    reasons = [_reason(name, candidate, limits) for name in broken_limits(candidate, limits)]
    if candidate.failure is not None:
        reasons.append(candidate.failure)
    elif not reasons and (candidate.speed is None or candidate.fidelity is None):
        reasons.append("not measured")
    return tuple(reasons)


def broken_limits(candidate: Measured, limits: Limits) -> list[str]:
    """Names of the limits that the known values of a candidate break."""
    broken = []
    for name, quantity in _QUANTITIES.items():
        limit, value = getattr(limits, name), quantity.of(candidate)
        # `not <=`, so that a NaN breaks it
        if limit is not None and value is not None and not value <= limit:
            broken.append(name)
    return broken


def _reason(name: str, candidate: Measured, limits: Limits) -> str:
    quantity = _QUANTITIES[name]
    value = quantity.of(candidate)
    assert value is not None  # only known values break a limit
    limit = float(getattr(limits, name))
    shown, shown_limit = quantity.show(value), quantity.show(limit)
    if shown == shown_limit:  # rounding must not print "20 > 20"
        shown, shown_limit = f"{value:.6g}", f"{limit:.6g}"
    return f"{quantity.label} {shown} > {quantity.flag} {shown_limit}"


def _slower(candidate: Measured, winner: Measured) -> str:
    assert candidate.speed is not None  # both qualified
    assert winner.speed is not None
    return f"slower: {candidate.speed.output_tokens_per_s:.1f} < {winner.speed.output_tokens_per_s:.1f} tok/s"


def _merit(candidate: Measured) -> tuple[float, float]:
    assert candidate.speed is not None
    assert candidate.fidelity is not None
    return candidate.speed.output_tokens_per_s, -candidate.fidelity.worst_kl


def _relaxations(candidates: Sequence[Measured], limits: Limits) -> tuple[Relaxation, ...]:
    known = [candidate for candidate in candidates if _is_known(candidate)]
    alone: dict[str, tuple[float, Relaxation]] = {}
    together: list[tuple[float, Relaxation]] = []
    for candidate in known:
        broken = broken_limits(candidate, limits)
        values = {name: _round_up(name, candidate) for name in broken}
        factor = max((_factor(values[name], getattr(limits, name)) for name in broken), default=1.0)
        offer = (factor, Relaxation(values, candidate.name))
        together.append(offer)
        if len(broken) == 1 and (broken[0] not in alone or factor < alone[broken[0]][0]):
            alone[broken[0]] = offer
    offers = list(alone.values())
    nearest = min(together, key=lambda offer: offer[0], default=None)
    if nearest is not None and all(nearest[0] < factor for factor, _ in offers):
        offers.append(nearest)
    return tuple(relaxation for _, relaxation in sorted(offers, key=lambda offer: offer[0]))


def _is_known(candidate: Measured) -> bool:
    values = [quantity.of(candidate) for quantity in _QUANTITIES.values()]
    return candidate.failure is None and all(value is not None and math.isfinite(value) for value in values)


def _round_up(name: str, candidate: Measured) -> float:
    """The candidate's value rounded up to what is printed, so that following the advice works."""
    value = _QUANTITIES[name].of(candidate)
    assert value is not None
    if name == "max_memory":
        return math.ceil(value / 1e6) * 1e6
    if value < 1e-12:  # far below any measurement
        return 1e-12
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{(math.floor(value / unit) + 1) * unit:.6g}")


def _factor(value: float, limit: float) -> float:
    return value / limit if limit > 0 else math.inf


def relaxed(limits: Limits, relaxation: Relaxation) -> Limits:
    """`limits` with the relaxation applied."""
    values = {name: int(v) if name == "max_memory" else v for name, v in relaxation.limits.items()}
    return replace(limits, **values)  # type: ignore[arg-type]  # mypy cannot see that names are fields
