"""What to say where the device has no memory left: what did not fit, how much was missing, which setting to change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from powertrain.types import PowertrainError


@contextmanager
def must_fit(what: str, advice: str) -> Iterator[None]:
    """Where the device runs out of memory inside, raise `PowertrainError`: `what` needs it, and `advice`.

    Also a decorator.
    """
    try:
        yield
    except RuntimeError as error:
        shortage = _shortage(error)
        if shortage is None:
            raise
        raise PowertrainError(out_of_memory(shortage, what, advice)) from error


def out_of_memory(error: torch.OutOfMemoryError, what: str, advice: str) -> str:
    """The sentence for `error`, with the sizes that torch tells."""
    message = str(error)
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", message)
    free = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", message)
    sizes = [f"{asked[1]} asked for"] if asked else []
    sizes += [f"{free[2]} of {free[1]} free"] if free else []
    return f"out of GPU memory for {what}" + (f" ({', '.join(sizes)})" if sizes else "") + f": {advice}"


def _shortage(error: BaseException) -> torch.OutOfMemoryError | None:
    """The out-of-memory error that `error` is or came of: a capture that is cut short ends with an error of its own."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, torch.OutOfMemoryError):
        seen = seen.__context__
    return seen
