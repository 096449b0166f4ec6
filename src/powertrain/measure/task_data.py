"""Files of tasks: JSON lines in the formats of the field, read strictly, and the texts a model is asked to judge."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from powertrain.text_data import read_utf8
from powertrain.types import PowertrainError


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question: candidate `answers[i]` continues `contexts[i]`; `gold` (from 0) is the right one.

    `line` counts from 1 in the file; `sha256` is of the line's content, whatever its spacing and order of fields.
    """

    line: int
    sha256: str
    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int

    def texts(self, separator: str | None = None) -> list[tuple[str, str]]:
        """(context, continuation) of every candidate; spaces that end the context open the continuation instead.

        `separator` stands between both. None is what the usual harness writes: a space, and `\\nAnswer: ` after a
        query that asks `Question:` and does not itself ask for the answer.
        """
        pairs = []
        for context, answer in zip(self.contexts, self.answers, strict=True):
            between = _separator_after(context) if separator is None else separator
            given = context + between
            pairs.append((given.rstrip(" "), given[len(given.rstrip(" ")) :] + answer))
        return pairs


def _separator_after(context: str) -> str:
    asks = re.search(r"^Question:", context, re.MULTILINE) and not context.endswith("Answer:")
    return "\nAnswer: " if asks else " "


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A file of items of one format. `sha256` and `num_in_file` are of the whole file, however few `items` are taken.

    `is_normalized`: the candidates differ in length, so that a score per byte means something.
    `is_last_word`: one candidate, right if it is the greedy continuation.
    """

    name: str
    path: Path
    format: str
    items: tuple[Item, ...]
    num_in_file: int
    sha256: str
    is_normalized: bool
    is_last_word: bool

    def first_by_hash(self, limit: int | None) -> Task:
        """The `limit` items of the smallest hashes, in the file's order: the same ones wherever they stand in it.

        A smaller subset is part of a larger one. None takes all.
        """
        if limit is None:
            return self
        chosen = sorted(self.items, key=lambda item: (item.sha256, item.line))[:limit]
        return replace(self, items=tuple(sorted(chosen, key=lambda item: item.line)))


class _Row:
    """One line of a file, whose fields are asked for by kind. Raises `PowertrainError` with file, line and field."""

    def __init__(self, where: str, fields: dict[str, Any]) -> None:
        self.where, self.fields = where, fields

    def refuse(self, field: str, wanted: str) -> PowertrainError:
        found = json.dumps(self.fields[field])
        found = found if len(found) <= 60 else found[:57] + "..."
        return PowertrainError(f"{self.where}: field `{field}` must be {wanted}, got {found}")

    def text(self, field: str) -> str:
        if not self._is_text(self.fields[field]):
            raise self.refuse(field, "a text that is not empty")
        return str(self.fields[field]).strip()

    def texts(self, field: str) -> tuple[str, ...]:
        values = self.fields[field]
        if not isinstance(values, list) or len(values) < 2 or not all(map(self._is_text, values)):
            raise self.refuse(field, "a list of at least two texts that are not empty")
        return tuple(value.strip() for value in values)

    def index(self, field: str, count: int) -> int:
        value = self.fields[field]
        if type(value) is not int or not 0 <= value < count:
            raise self.refuse(field, f"a whole number from 0 to {count - 1}")
        return value

    @staticmethod
    def _is_text(value: Any) -> bool:
        # a lone surrogate, which JSON can spell, is no text a tokenizer takes
        return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


Texts = tuple[tuple[str, ...], tuple[str, ...], int]
"""Contexts, answers, gold."""


def _one_context(context: str, answers: tuple[str, ...], gold: int) -> Texts:
    return (context,) * len(answers), answers, gold


def _choices(row: _Row) -> Texts:
    choices = row.texts("choices")
    return _one_context(row.text("query"), choices, row.index("gold", len(choices)))


def _endings(row: _Row) -> Texts:
    endings = row.texts("endings")
    return _one_context(row.text("ctx"), endings, row.index("label", len(endings)))


def _last_word(row: _Row) -> Texts:
    return _one_context(row.text("context"), (row.text("continuation"),), 0)


def _context_options(row: _Row) -> Texts:
    options = row.texts("context_options")
    return options, (row.text("continuation"),) * len(options), row.index("gold", len(options))


_READERS: dict[tuple[str, ...], Callable[[_Row], Texts]] = {
    ("query", "choices", "gold"): _choices,
    ("ctx", "endings", "label"): _endings,
    ("context", "continuation"): _last_word,
    ("context_options", "continuation", "gold"): _context_options,
}
"""Fields of each format, the one that tells it apart first. Other fields of a line are passed over."""


def read_task(path: str | Path) -> Task:
    """Read a `.jsonl` file (maybe `.gz`) whose lines all have one format.

    `query/choices/gold`: ARC, PIQA, BoolQ, OpenBookQA, CommonsenseQA, COPA. `ctx/endings/label`: HellaSwag.
    `context/continuation`: LAMBADA. `context_options/continuation/gold`: WinoGrande. Raises `PowertrainError` naming
    the file, and the line and field at fault.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if not name.endswith(".jsonl"):
        raise PowertrainError(f"{path}: a task is a .jsonl file (maybe .gz)")
    text = read_utf8(path, "a task is a .jsonl file (maybe .gz)")
    rows = [_row(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise PowertrainError(f"{path}: holds no items")
    fields = _format_of(rows[0][0])
    items = tuple(_item(row, number, fields) for row, number in rows)
    digest = hashlib.sha256("".join(item.sha256 + "\n" for item in items).encode())
    return Task(
        name=name.removesuffix(".jsonl"),
        path=path,
        format="/".join(fields),
        items=items,
        num_in_file=len(items),
        sha256=digest.hexdigest(),
        is_normalized=fields[0] in ("query", "ctx"),
        is_last_word=fields[0] == "context",
    )


def read_tasks(paths: Sequence[str | Path]) -> list[Task]:
    """Read several files. Raises what `read_task` raises, and for two of one name."""
    tasks = [read_task(path) for path in paths]
    for number, task in enumerate(tasks):
        for other in tasks[:number]:
            if other.name == task.name:
                raise PowertrainError(f"{other.path} and {task.path} are both called {task.name}: rename one")
    return tasks


def _row(path: Path, number: int, line: str) -> tuple[_Row, int]:
    where = f"{path}:{number}"
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise PowertrainError(f"{where}: not a line of JSON") from None
    if not isinstance(fields, dict):
        raise PowertrainError(f"{where}: not a JSON object")
    return _Row(where, fields), number


def _format_of(row: _Row) -> tuple[str, ...]:
    found = [fields for fields in _READERS if fields[0] in row.fields]
    if len(found) == 1:
        return found[0]
    known = ", ".join("/".join(fields) for fields in found or _READERS)
    raise PowertrainError(f"{row.where}: {'fits several formats' if found else 'fits no format'}: {known}")


def _item(row: _Row, number: int, fields: tuple[str, ...]) -> Item:
    for field in fields:
        if field not in row.fields:
            raise PowertrainError(f"{row.where}: field `{field}` is missing; this file's lines are {'/'.join(fields)}")
    contexts, answers, gold = _READERS[fields](row)
    content = json.dumps(row.fields, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Item(line=number, sha256=digest, contexts=contexts, answers=answers, gold=gold)
