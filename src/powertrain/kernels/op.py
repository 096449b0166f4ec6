"""An op is its reference; a provider is a faster way to the same values.

Providers say `supported()` (this machine) and `accepts(*args)` (these arguments: None, or the reason why not). The
first in the op's order that takes the arguments runs; the reference always can. `explain` tells which and why.

`choosing` narrows the choice: to the reference, or to providers whose every row has the same bits whatever rows stand
beside it, which batched arithmetic does not give by itself (He et al. 2025, *Defeating Nondeterminism in LLM
Inference*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

Choice = Literal["fast", "invariant", "reference"]

_choice: ContextVar[Choice] = ContextVar("choice", default="fast")


@contextmanager
def choosing(choice: Choice) -> Iterator[None]:
    """Every op called inside, by this thread, takes the fastest provider, one that is batch-invariant, or none."""
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


@dataclass(frozen=True)
class Provider(Generic[P, R]):
    """One implementation. `accepts` returns None when it can run these arguments, else the reason.

    `choices`: where it stands for election; "invariant" only if a row's bits do not depend on the rows beside it.
    """

    name: str
    run: Callable[P, R]
    accepts: Callable[P, str | None]
    supported: Callable[[], str | None] = field(default=lambda: None)
    choices: tuple[Choice, ...] = ("fast",)


class Op(Generic[P, R]):
    """A callable op: `op(*args)` runs the first provider that accepts the arguments, else the reference."""

    def __init__(self, name: str, reference: Callable[P, R], providers: tuple[Provider[Any, Any], ...] = ()) -> None:
        self.name = name
        self.reference = reference
        self.providers = tuple(p for p in providers if p.supported() is None)
        self.unsupported = {p.name: p.supported() for p in providers if p.supported() is not None}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        choice = _choice.get()
        for provider in self.providers:
            if choice in provider.choices and provider.accepts(*args, **kwargs) is None:
                out: R = provider.run(*args, **kwargs)
                return out
        return self.reference(*args, **kwargs)

    def choose(self, *args: Any, **kwargs: Any) -> tuple[str, list[str]]:
        """The name of who would run these arguments, and why each one before it would not."""
        choice = _choice.get()
        if choice == "reference":
            return "reference", []
        refusals = [f"{name}: {reason}" for name, reason in self.unsupported.items()]
        for provider in self.providers:
            if choice not in provider.choices:
                continue
            reason = provider.accepts(*args, **kwargs)
            if reason is None:
                return provider.name, refusals
            refusals.append(f"{provider.name}: {reason}")
        return "reference", refusals

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """`choose` in one line."""
        if _choice.get() == "reference":
            return f"{self.name}: reference (asked for)"
        name, refusals = self.choose(*args, **kwargs)
        return f"{self.name}: {name}" + (f" (not {'; '.join(refusals)})" if refusals else "")
