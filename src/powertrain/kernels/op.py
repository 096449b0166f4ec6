"""An op is its reference; a provider is a faster way to the same values.

Providers say `supported()` (this machine) and `accepts(*args)` (these arguments: None, or the reason why not). The
first in the op's order that takes the arguments runs; the reference always can. `explain` tells which and why.

`choosing` narrows the choice: to the reference, or to providers whose every row has the same bits whatever rows stand
beside it, which batched arithmetic does not give by itself (He et al. 2025, *Defeating Nondeterminism in LLM
Inference*).
Inside `recorded_choices` every call is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, ParamSpec, TypeAlias, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

Mode = Literal["fast", "invariant", "reference"]


@dataclass(slots=True)
class Choice:
    """The calls of one op that one provider ran.

    shapes: the tensors of the first call, like `8x576 float32`; refusals: why not each provider before it, each reason
    once, over all calls.
    """

    op: str
    provider: str
    shapes: list[str]
    refusals: list[str] = field(default_factory=list)
    num_calls: int = 0

    def __str__(self) -> str:
        return f"{self.op}: {self.provider}" + (f" (not {'; '.join(self.refusals)})" if self.refusals else "")


Choices: TypeAlias = dict[tuple[str, str], Choice]
"""By op and provider, in the order of their first calls."""

_mode: ContextVar[Mode] = ContextVar("mode", default="fast")
_recorder: ContextVar[Choices | None] = ContextVar("recorder", default=None)


def current_mode() -> Mode:
    """What `choosing` has set, for this thread."""
    return _mode.get()


@contextmanager
def choosing(mode: Mode) -> Iterator[None]:
    """Every op called inside, by this thread, takes the fastest provider, one that is batch-invariant, or none."""
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


@contextmanager
def recorded_choices() -> Iterator[Choices]:
    """Note who runs each op called inside, by this thread; of nested ones the innermost notes.

    What replays, as a captured graph does, calls no op.
    """
    choices: Choices = {}
    token = _recorder.set(choices)
    try:
        yield choices
    finally:
        _recorder.reset(token)


@dataclass(frozen=True)
class Provider(Generic[P, R]):
    """One implementation. `accepts` returns None when it can run these arguments, else the reason.

    `modes`: where it may run; "invariant" only if a row's bits do not depend on the rows beside it.
    """

    name: str
    run: Callable[P, R]
    accepts: Callable[P, str | None]
    supported: Callable[[], str | None] = field(default=lambda: None)
    modes: tuple[Mode, ...] = ("fast",)


class Op(Generic[P, R]):
    """A callable op: `op(*args)` runs the first provider that accepts the arguments, else the reference."""

    def __init__(self, name: str, reference: Callable[P, R], providers: tuple[Provider[Any, Any], ...] = ()) -> None:
        self.name = name
        self.reference = reference
        self.providers = tuple(p for p in providers if p.supported() is None)
        self.unsupported = {p.name: p.supported() for p in providers if p.supported() is not None}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if (choices := _recorder.get()) is not None:
            self._record(choices, *args, **kwargs)
        mode = _mode.get()
        for provider in self.providers:
            if mode in provider.modes and provider.accepts(*args, **kwargs) is None:
                out: R = provider.run(*args, **kwargs)
                return out
        return self.reference(*args, **kwargs)

    def choose(self, *args: Any, **kwargs: Any) -> tuple[str, list[str]]:
        """The name of who would run these arguments, and why each one before it would not."""
        mode = _mode.get()
        if mode == "reference":
            return "reference", [f"{provider.name}: the reference was asked for" for provider in self.providers]
        refusals = [f"{name}: {reason}" for name, reason in self.unsupported.items()]
        for provider in self.providers:
            if mode not in provider.modes:
                continue
            reason = provider.accepts(*args, **kwargs)
            if reason is None:
                return provider.name, refusals
            refusals.append(f"{provider.name}: {reason}")
        return "reference", refusals

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """`choose` in one line."""
        name, refusals = self.choose(*args, **kwargs)
        return str(Choice(self.name, name, [], refusals))

    def _record(self, choices: Choices, *args: Any, **kwargs: Any) -> None:
        name, refusals = self.choose(*args, **kwargs)
        choice = choices.get((self.name, name))
        if choice is None:
            choice = Choice(self.name, name, list(_shapes((*args, *kwargs.values()))))
            choices[self.name, name] = choice
        choice.num_calls += 1
        choice.refusals += [reason for reason in refusals if reason not in choice.refusals]


def _shapes(values: Iterable[Any]) -> Iterator[str]:
    """The tensors among `values`, those in tuples included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield f"{'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
        elif isinstance(value, tuple):
            yield from _shapes(value)
