"""Files of tasks: every format, what is refused and how it is named, and subsets that do not depend on the order."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powertrain.measure.task_data import Item, read_task, read_tasks
from powertrain.types import PowertrainError

CHOICES = {"query": "Question: How far?", "choices": ["a mile", "two"], "gold": 1}
ENDINGS = {"ctx": "Roofing: A man is on a roof. he", "endings": ["sings.", "falls.", "works."], "label": 2}
LAST_WORD = {"context": "the sun said nothing, and the engine went", "continuation": "anyway"}
OPTIONS = {"context_options": ["Sun is late so Sun", "Sun is late so Rain"], "continuation": "waits.", "gold": 0}


def write(path: Path, *rows: Any) -> Path:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


@pytest.mark.parametrize(
    ("row", "texts", "gold"),
    [
        (CHOICES, [("Question: How far?\nAnswer:", " a mile"), ("Question: How far?\nAnswer:", " two")], 1),
        (ENDINGS, [(ENDINGS["ctx"], f" {ending}") for ending in ENDINGS["endings"]], 2),
        (LAST_WORD, [(LAST_WORD["context"], " anyway")], 0),
        (OPTIONS, [("Sun is late so Sun", " waits."), ("Sun is late so Rain", " waits.")], 0),
    ],
)
def test_formats_of_the_field(tmp_path: Path, row: dict[str, Any], texts: list[tuple[str, str]], gold: int):
    task = read_task(write(tmp_path / "some.jsonl.gz", row, "", {**row, "id": 7}))
    assert task.name == "some"
    assert [item.line for item in task.items] == [1, 3]
    assert task.items[0].texts() == texts
    assert {item.gold for item in task.items} == {gold}
    assert task.is_normalized == (row in (CHOICES, ENDINGS))
    assert task.is_last_word == (row is LAST_WORD)
    assert task.items[0].sha256 != task.items[1].sha256


@pytest.mark.parametrize(
    ("query", "separator", "context", "continuation"),
    [
        ("The tap ran, therefore", None, "The tap ran, therefore", " x"),
        ("Question: Why?\nChoices:\nA. a\nAnswer:", None, "Question: Why?\nChoices:\nA. a\nAnswer:", " x"),
        ("Passage: Much.\nQuestion: is it?", None, "Passage: Much.\nQuestion: is it?\nAnswer:", " x"),
        ("Question: Why?\n", None, "Question: Why?\nAnswer:", " x"),
        ("Question: Why?", " ", "Question: Why?", " x"),
        ("Why?", "\n", "Why?\n", "x"),
        ("Why?", "", "Why?", "x"),
    ],
)
def test_what_stands_between(tmp_path: Path, query: str, separator: str | None, context: str, continuation: str):
    row = {"query": query, "choices": [" x ", "y"], "gold": 0}
    (item,) = read_task(write(tmp_path / "t.jsonl", row)).items
    assert item.texts(separator)[0] == (context, continuation)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([CHOICES, "{"], r"t\.jsonl:2: not a line of JSON"),
        (["[1]"], r"t\.jsonl:1: not a JSON object"),
        ([{"question": "x"}], r"t\.jsonl:1: fits no format: query/choices/gold, ctx/endings/label, "),
        ([{**CHOICES, **ENDINGS}], r"t\.jsonl:1: fits several formats: query/choices/gold, ctx/endings/label"),
        ([CHOICES, LAST_WORD], r"t\.jsonl:2: field `query` is missing; this file's lines are query/choices/gold"),
        ([{"query": "x", "choices": ["a", "b"]}], r"t\.jsonl:1: field `gold` is missing"),
        ([CHOICES, {**CHOICES, "gold": 2}], r":2: field `gold` must be a whole number from 0 to 1, got 2"),
        ([{**CHOICES, "gold": True}], r"field `gold` must be a whole number from 0 to 1, got true"),
        ([{**CHOICES, "gold": "1"}], r"field `gold` must be a whole number .* got \"1\""),
        ([{**CHOICES, "gold": -1}], r"field `gold`"),
        ([{**CHOICES, "choices": ["a"]}], r"field `choices` must be a list of at least two texts"),
        ([{**CHOICES, "choices": ["a", " "]}], r"field `choices`"),
        ([{**CHOICES, "choices": ["a", 1]}], r"field `choices`"),
        ([{**CHOICES, "query": "\ud800"}], r"field `query` must be a text"),
        ([{**ENDINGS, "label": 3}], r"field `label` must be a whole number from 0 to 2, got 3"),
        ([{**LAST_WORD, "continuation": ""}], r"field `continuation` must be a text that is not empty, got \"\""),
        ([{**OPTIONS, "context_options": "ab"}], r"field `context_options`"),
        ([], r"t\.jsonl: holds no items"),
    ],
)
def test_a_line_that_does_not_fit_is_refused_by_name(tmp_path: Path, rows: list[Any], message: str):
    with pytest.raises(PowertrainError, match=message):
        read_task(write(tmp_path / "t.jsonl", *rows))


def test_files_that_are_no_tasks(tmp_path: Path):
    with pytest.raises(PowertrainError, match=r"missing\.jsonl: cannot be read"):
        read_task(tmp_path / "missing.jsonl")
    with pytest.raises(PowertrainError, match=r"t\.txt: a task is a \.jsonl file"):
        read_task(write(tmp_path / "t.txt", CHOICES))
    damaged = tmp_path / "d.jsonl.gz"
    damaged.write_bytes(gzip.compress(b"x" * 1000)[:-12])
    with pytest.raises(PowertrainError, match=r"d\.jsonl\.gz: cannot be read"):
        read_task(damaged)
    (tmp_path / "other").mkdir()
    one, two = write(tmp_path / "t.jsonl", CHOICES), write(tmp_path / "other" / "t.jsonl.gz", CHOICES)
    with pytest.raises(PowertrainError, match="are both called t: rename one"):
        read_tasks([one, two])


@given(st.permutations(range(12)), st.integers(1, 14), st.integers(0, 14))
def test_a_subset_is_the_same_in_any_order_and_part_of_a_larger_one(order: list[int], limit: int, more: int):
    items = [
        Item(line=line, sha256=f"{hash_ * 7919 % 104729:064x}", contexts=("c",), answers=("a",), gold=0)
        for line, hash_ in enumerate(order, 1)
    ]
    base = {"path": Path("t.jsonl"), "name": "t", "format": "", "num_in_file": 12, "sha256": ""}
    from powertrain.measure.task_data import Task

    def chosen(items: list[Item], limit: int) -> list[str]:
        task = Task(**base, items=tuple(items), is_normalized=True, is_last_word=False).first_by_hash(limit)
        assert [item.line for item in task.items] == sorted(item.line for item in task.items)
        return sorted(item.sha256 for item in task.items)

    small = chosen(items, limit)
    assert len(small) == min(limit, 12)
    assert small == chosen([*reversed(items)], limit)
    assert set(small) <= set(chosen(items, limit + more))


def test_the_hash_is_of_the_content(tmp_path: Path):
    spaced = write(tmp_path / "a.jsonl", '{"gold":  1, "choices": ["a mile", "two"], "query": "Question: How far?"}')
    assert read_task(spaced).sha256 == read_task(write(tmp_path / "b.jsonl", CHOICES)).sha256
    assert read_task(spaced).sha256 != read_task(write(tmp_path / "c.jsonl", {**CHOICES, "gold": 0})).sha256


@pytest.mark.parametrize(
    ("file", "format", "count"),
    [
        ("arc/arc_easy_test", "query/choices/gold", 2376),
        ("piqa/piqa_val", "query/choices/gold", 1838),
        ("boolq/boolq_val", "query/choices/gold", 3270),
        ("openbookqa/openbookqa_test", "query/choices/gold", 500),
        ("commonsenseqa/commonsenseqa_dev", "query/choices/gold", 1221),
        ("copa/copa_val", "query/choices/gold", 100),
        ("hellaswag/hellaswag_val", "ctx/endings/label", 10042),
        ("lambada/lambada_openai_test", "context/continuation", 5153),
        ("winogrande/winogrande_dev", "context_options/continuation/gold", 1267),
    ],
)
def test_the_real_files_are_read(shared_dir: Path, file: str, format: str, count: int):
    task = read_task(shared_dir / "data" / f"{file}.jsonl.gz")
    assert (task.format, task.num_in_file) == (format, count)
