"""The fixtures themselves, judged by transformers: everything else stands on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_builders import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_run_and_are_not_flat(tiny_model_dir: Callable[[str], Path], family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_model_dir(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Once upon a time, 東京!"}], return_tensors="pt")
    with torch.no_grad():
        logits = model(ids["input_ids"]).logits[0]
    assert tokenizer.decode(ids["input_ids"][0]) == "<s><|user|>Once upon a time, 東京!</s>"
    assert logits.softmax(-1).max(-1).values.mean() > 0.05
    assert logits.argmax(-1).unique().numel() > 3


def test_stories260k_tells_its_published_story(stories260k_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(stories260k_dir)
    tokenizer = AutoTokenizer.from_pretrained(stories260k_dir)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=64, do_sample=False)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )
