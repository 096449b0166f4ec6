"""A file that grows by one line per scored item, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from powertrain.measure.record import write_text_atomically
from powertrain.measure.task_scoring import Answer
from powertrain.types import PowertrainError

KIND = "task-journal"

Key = tuple[str, str, str]
"""Model (`reference` or `candidate`), task, hash of the item."""


class Journal:
    """Answers by key. With a `path` they are kept there too, and those already there are read.

    The first line states what the answers hold for: `header`, models, tasks and settings. Each answer is one line,
    handed to the system in one write. A line without its end, left by a kill in that very moment, is cut off.
    Raises `PowertrainError` naming the file if it is of another run, damaged, no journal, or cannot be written.
    """

    def __init__(self, path: Path | None, header: Mapping[str, str]) -> None:
        self._path = path
        self._answers: dict[Key, Answer] = {}
        self._stream: BinaryIO | None = None
        if path is None:
            return
        if path.exists():
            self._read(path, header)
        else:
            write_text_atomically(path, _line({"schema": 1, "kind": KIND, "header": dict(header)}))
        self.num_read = len(self._answers)
        try:
            self._stream = path.open("ab", buffering=0)
        except OSError as error:
            raise PowertrainError(f"cannot write {path}: {error.strerror}") from None

    num_read = 0
    """Answers that an earlier run left."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def get(self, key: Key) -> Answer | None:
        return self._answers.get(key)

    def add(self, key: Key, answer: Answer) -> None:
        self._answers[key] = answer
        if self._stream is None:
            return
        line = _line({"key": list(key), "logprobs": list(answer.logprobs), "is_greedy": list(answer.is_greedy)})
        content = line.encode()
        try:
            is_whole = self._stream.write(content) == len(content)
        except OSError as error:
            raise PowertrainError(f"cannot write {self._path}: {error.strerror}") from None
        if not is_whole:
            raise PowertrainError(f"cannot write {self._path}: no room for a whole line")

    def _read(self, path: Path, header: Mapping[str, str]) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PowertrainError(f"cannot read {path}: {error.strerror}") from None
        *lines, rest = content.split(b"\n")
        first = _object(lines[0]) if lines else None
        if first is None or first.get("kind") != KIND or not isinstance(first.get("header"), dict):
            raise PowertrainError(f"{path}: is there but is no journal of tasks; give --resume another name")
        for difference in _differences(first["header"], header):
            raise PowertrainError(
                f"{path}: holds results of another run: {difference}; delete it, or give --resume another name"
            )
        for number, line in enumerate(lines[1:], 2):
            key, answer = _entry(line, f"{path}:{number}")
            self._answers[key] = answer
        if rest:
            with path.open("r+b") as stream:
                stream.truncate(len(content) - len(rest))


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _entry(line: bytes, where: str) -> tuple[Key, Answer]:
    value = _object(line) or {}
    key, logprobs, is_greedy = (value.get(name) for name in ("key", "logprobs", "is_greedy"))
    is_good = (
        isinstance(key, list)
        and len(key) == 3
        and all(isinstance(part, str) for part in key)
        and isinstance(logprobs, list)
        and all(type(number) is float and math.isfinite(number) for number in logprobs)
        and isinstance(is_greedy, list)
        and all(isinstance(flag, bool) for flag in is_greedy)
        and len(logprobs) == len(is_greedy)
    )
    if not is_good:
        raise PowertrainError(f"{where}: this journal is damaged; delete it, or give --resume another name")
    model, task, item = value["key"]
    return (model, task, item), Answer(tuple(value["logprobs"]), tuple(value["is_greedy"]))


def _differences(before: Mapping[str, Any], now: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name):
            yield f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}"


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_hash else text
