"""What verbs share to answer with: lines and progress bars on stderr, the record that `--json` asks for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Progress = Callable[[str, float, float | None], None]


def say(message: str) -> None:
    """One line for the person, on stderr: stdout carries only results."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A callback `(what, done, total)` that draws one bar per `what` on stderr; silent when that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def show(what: str, done: float, total: float | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Write `record` where `--json` says, if it was given."""
    if path is not None:
        from powertrain.measure.record import write_record

        write_record(path, record)
        say(f"wrote {path}")
