"""Files of text to windows of token ids: every token once, unreadable files named."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.text_data import Window, encode_texts, read_texts, spread, token_sha256, windows_of
from powertrain.types import PowertrainError


def test_plain_and_packed_text_are_one_document(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo é\n", encoding="utf-8")
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write("one\n\ntwo é\n")
    assert read_texts(tmp_path / "a.txt") == read_texts(tmp_path / "a.txt.gz") == ["one\n\ntwo é\n"]


def test_json_lines_by_their_fields(tmp_path: Path):
    rows = [
        {"text": "plain"},
        {"prompt": "Say hi.", "response": "hi", "id": 3},
        {"question": "2+2?", "answer": "4"},
        {"context": "the cat sat on the", "continuation": "mat"},
        {"prompt": "def f():", "canonical_solution": "\n    pass"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_texts(tmp_path / "rows.jsonl") == [
        "plain",
        "Say hi.\nhi",
        "2+2?\n4",
        "the cat sat on the mat",
        "def f():\n    pass",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a\.jsonl:2: none of the known fields"),
        ("a.jsonl", b"{nope\n", r"a\.jsonl:1: not a line of JSON"),
        ("a.jsonl", b"", "holds no text"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PowertrainError, match=message) as caught:
        read_texts(tmp_path / name)
    assert name in str(caught.value)


def test_an_absent_file_is_named(tmp_path: Path):
    with pytest.raises(PowertrainError, match=r"gone\.txt: cannot be read \(No such file or directory\)"):
        read_texts(tmp_path / "gone.txt")


@given(st.integers(0, 300), st.integers(2, 40), st.data())
def test_every_token_but_the_first_of_a_window_is_predicted_once(count: int, window: int, data: st.DataObject):
    stride = data.draw(st.integers(1, window))
    windows = windows_of(range(count), window, stride)
    scored = [token for part in windows for token in part.token_ids[part.num_context :]]
    assert all(len(part.token_ids) <= window and part.num_context >= 1 and part.num_scored >= 1 for part in windows)
    assert scored == sorted(set(scored))
    if stride == window:
        # Only the first token of each window goes unpredicted.
        assert set(range(count)) - set(scored) == set(range(0, count, window))
    else:
        assert set(range(count)) - set(scored) <= {0}


@pytest.mark.parametrize(("window", "stride"), [(1, None), (8, 9), (8, -1)])
def test_impossible_windows_are_refused(window: int, stride: int | None):
    with pytest.raises(PowertrainError, match="window must be at least 2"):
        windows_of([1, 2, 3], window, stride)


def test_a_spread_covers_the_whole_text_in_full_windows():
    windows = windows_of(range(105), 10)
    chosen = spread(windows, 40)
    assert len(chosen) == 4
    assert chosen[0].token_ids[0] == 0
    assert chosen[-1].token_ids[-1] == 99
    assert all(len(part.token_ids) == 10 for part in chosen)
    assert len(spread(windows, 10_000)) == 10
    assert len(spread(windows, 1)) == 1


def test_the_hash_is_of_little_endian_int32_ids():
    expected = hashlib.sha256(np.array([1, 2, 70000, 3, 4], dtype="<i4").tobytes()).hexdigest()
    assert token_sha256([Window((1, 2, 70000)), Window((3, 4), 1)]) == expected


def test_documents_are_separated_by_the_end_of_text(tiny_model_dir):
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    one, two = tokenizer.encode("The sun."), tokenizer.encode("The rain.")
    assert encode_texts(["The sun.", "The rain."], tokenizer) == [*one, tokenizer.eos_token_ids[0], *two]


def test_wikitext_reads_to_its_published_size(shared_dir: Path):
    texts = read_texts(shared_dir / "data" / "wikitext2" / "wiki.test.raw.gz")
    assert len(texts) == 1
    assert len(texts[0].encode()) == 1_290_590
    for name in ("chat/dolly_hh_small.jsonl.gz", "gsm8k/test.jsonl.gz", "humaneval/HumanEval.jsonl.gz"):
        assert len(read_texts(shared_dir / "data" / name)) > 100
