"""An op is its reference; a provider is a faster way to the same values.

Providers say `supported()` (this machine) and `accepts(*args)` (these arguments: None, or the reason why not). The
first in the op's order that takes the arguments runs; the reference always can. `explain` tells which and why.
Inside `reference_only` no provider runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_is_reference_only: ContextVar[bool] = ContextVar("is_reference_only", default=False)


@contextmanager
def reference_only(is_on: bool = True) -> Iterator[None]:
    """Every op called inside, by this thread, runs its reference."""
    token = _is_reference_only.set(is_on)
    try:
        yield
    finally:
        _is_reference_only.reset(token)


@dataclass(frozen=True)
class Provider(Generic[P, R]):
    """One implementation. `accepts` returns None when it can run these arguments, else the reason."""

    name: str
    run: Callable[P, R]
    accepts: Callable[P, str | None]
    supported: Callable[[], str | None] = field(default=lambda: None)


class Op(Generic[P, R]):
    """A callable op: `op(*args)` runs the first provider that accepts the arguments, else the reference."""

    def __init__(self, name: str, reference: Callable[P, R], providers: tuple[Provider[Any, Any], ...] = ()) -> None:
        self.name = name
        self.reference = reference
        self.providers = tuple(p for p in providers if p.supported() is None)
        self.unsupported = {p.name: p.supported() for p in providers if p.supported() is not None}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not _is_reference_only.get():
            for provider in self.providers:
                if provider.accepts(*args, **kwargs) is None:
                    out: R = provider.run(*args, **kwargs)
                    return out
        return self.reference(*args, **kwargs)

    def choose(self, *args: Any, **kwargs: Any) -> tuple[str, list[str]]:
        """The name of who would run these arguments, and why each one before it would not."""
        if _is_reference_only.get():
            return "reference", []
        refusals = [f"{name}: {reason}" for name, reason in self.unsupported.items()]
        for provider in self.providers:
            reason = provider.accepts(*args, **kwargs)
            if reason is None:
                return provider.name, refusals
            refusals.append(f"{provider.name}: {reason}")
        return "reference", refusals

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """`choose` in one line."""
        if _is_reference_only.get():
            return f"{self.name}: reference (asked for)"
        name, refusals = self.choose(*args, **kwargs)
        return f"{self.name}: {name}" + (f" (not {'; '.join(refusals)})" if refusals else "")
