"""Reading the entries of a recipe's step: what is unknown or of the wrong kind is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from powertrain.types import PowertrainError


def refuse_unknown_keys(value: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise PowertrainError(f"{where}: unknown key {key!r}; the known ones are {', '.join(known)}")


def one_of(value: Any, known: Sequence[str], where: str) -> str:
    if value not in known:
        problem = "is missing" if value is None else f"is unknown: {value!r}"
        raise PowertrainError(f"{where} {problem}; the known ones are {', '.join(known)}")
    return str(value)


def integer(value: Any, where: str, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PowertrainError(f"{where} must be an integer of at least {least}, got {value!r}")
    return value


def fraction(value: Any, where: str) -> float:
    """A number in [0, 1]."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise PowertrainError(f"{where} must be a number from 0 to 1, got {value!r}")
    return float(value)


def boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise PowertrainError(f"{where} must be true or false, got {value!r}")
    return value
