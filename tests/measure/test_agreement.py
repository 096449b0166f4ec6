"""Greedy agreement: prompts as files hold them, and lengths against texts written one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_builders import TINY_TEXT
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.compress import compress
from powertrain.kernels import native
from powertrain.llm import LLM
from powertrain.measure.agreement import _first_difference, agreement, read_prompts
from powertrain.measure.scoring import read_model
from powertrain.types import PowertrainError, SamplingParams

TinyModel = Callable[[str], Path]


def test_lengths_are_those_of_texts_written_alone(tiny_model_dir: TinyModel, tmp_path: Path):
    if native.load() is None:  # only there a row does not depend on its batch
        pytest.skip(f"no native kernels: {native.unavailable()}")
    folder, out = tiny_model_dir("llama"), tmp_path / "w8"
    compress(folder, out, "W8A16", dtype="float32")
    file = tmp_path / "prompts.txt"
    lines = [line.strip() for line in TINY_TEXT.split(".") if line.strip()]
    file.write_text("\n\n".join(lines), encoding="utf-8")
    models = [read_model(out), read_model(folder)]
    found = agreement(*models, file, num_prompts=4, max_tokens=24)
    written = []
    for path in (out, folder):
        with LLM(str(path), max_num_seqs=1) as llm:
            outputs = llm.generate(lines[:4], SamplingParams(temperature=0.0, max_tokens=24))
            written.append([output.outputs[0].token_ids for output in outputs])
    expected = []
    for ours, theirs in zip(*written, strict=True):
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        expected.append(same.index(False) if False in same else len(same))
    assert list(found.lengths) == expected
    assert (found.p25, found.median, found.p75) == tuple(np.percentile(expected, (25, 50, 75)))
    assert 0 < found.median < 24
    itself = agreement(models[1], models[1], file, num_prompts=2, max_tokens=8)
    assert (itself.identical, itself.num_prompts) == (1.0, 2)
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(PowertrainError, match="holds 512"):
        agreement(models[1], models[1], file, max_tokens=600)


def test_prompts_of_every_kind(tiny_model_dir: TinyModel, tmp_path: Path):
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"messages": chat}, {"turns": ["hi", "more"]}, {"prompt": "hi", "response": "ho"}, {"question": "hi"}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows, {"other": 1}])))
    plain, templated = tuple(tokenizer.encode("hi")), tuple(tokenizer.apply_chat_template(chat))
    assert read_prompts(file, tokenizer, 4) == [templated, templated, plain, plain]
    with pytest.raises(PowertrainError, match=r"p\.jsonl:5: none of the fields messages, turns, prompt"):
        read_prompts(file, tokenizer, 5)
    file.write_text("{")
    with pytest.raises(PowertrainError, match=r"p\.jsonl:1: "):
        read_prompts(file, tokenizer, 5)
    file.write_text("\n")
    with pytest.raises(PowertrainError, match="holds no prompts"):
        read_prompts(file, tokenizer, 5)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_the_first_difference(one: list[int], other: list[int]):
    at = _first_difference(one, other)
    assert one[:at] == other[:at]
    assert at == min(len(one), len(other)) or one[at] != other[at]
