"""Acceptance of drafts: the steps counted along the target's text against those of transformers' speculation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_builders import TINY_TEXT
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import hugging_face_files, load_tokenizer
from powertrain.measure.acceptance import NUM_DRAFTED, acceptance, num_steps, summarize_acceptance
from powertrain.measure.scoring import read_model
from powertrain.measure.statistics import summarize_ratios
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def draft_dir(tiny_model_dir: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target with noise in its weights: it agrees here and there."""
    source = open_checkpoint(tiny_model_dir("llama"))
    noise = torch.Generator().manual_seed(0)
    weights = {name: source.load(name) for name in source.names()}
    noisy = {
        name: w if w.dim() == 1 else w + 0.05 * w.std() * torch.randn(w.shape, generator=noise)
        for name, w in weights.items()
    }
    out = tmp_path_factory.mktemp("draft") / "model"
    write_checkpoint(out, source.config, iter(noisy.items()), hugging_face_files(source.path))
    return out


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [line.strip() for line in TINY_TEXT.split(".") if line.strip()]
    (tmp_path / "prompts.txt").write_text("\n".join(lines[:3]))
    return tmp_path / "prompts.txt"


def test_steps_are_those_that_transformers_takes_with_the_draft(
    tiny_model_dir: TinyModel, draft_dir: Path, prompts: Path
) -> None:
    import transformers

    models = read_model(draft_dir), read_model(tiny_model_dir("llama"), dtype="float32")
    found = acceptance(*models, prompts, max_tokens=NUM_TOKENS)
    target, draft = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (tiny_model_dir("llama"), draft_dir)
    )
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    tokenizer = load_tokenizer(tiny_model_dir("llama"))
    eos = list(tokenizer.eos_token_ids)
    passes: list[int] = []
    target.register_forward_hook(lambda *_: passes.append(1))
    for k in (1, 4):
        draft.generation_config.num_assistant_tokens = k
        passes.clear()
        num_tokens = 0
        for line in prompts.read_text().splitlines():
            ids = torch.tensor([tokenizer.encode(line)])
            limits = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": eos}
            text = target.generate(ids, assistant_model=draft, **limits)
            num_tokens += text.shape[1] - ids.shape[1]
        assert num_tokens == found.num_tokens
        assert found.tokens_per_step[k] == pytest.approx(num_tokens / len(passes))
    assert 0.2 < found.alpha < 0.95
    assert 1 < found.tokens_per_step[1] < found.tokens_per_step[8]
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_model_accepts_its_own_drafts_and_other_vocabularies_none(
    tiny_model_dir: TinyModel, prompts: Path, stories260k_dir: Path
) -> None:
    target = read_model(tiny_model_dir("llama"), dtype="float32")
    found = acceptance(target, target, prompts, num_prompts=2, max_tokens=NUM_TOKENS)
    assert (found.alpha, found.num_prompts) == (1.0, 2)
    assert found.tokens_per_step[4] == pytest.approx(found.num_tokens / (2 * -(-NUM_TOKENS // 5)), rel=0.3)
    with pytest.raises(PowertrainError, match="only models of one vocabulary"):
        acceptance(read_model(stories260k_dir), target, prompts)
    with pytest.raises(PowertrainError, match="max_tokens must be at least 1"):
        acceptance(target, target, prompts, max_tokens=0)


def by_hand(guesses: list[bool], num_drafted: int) -> tuple[int, int]:
    """(steps, drafts accepted), a token at a time."""
    steps = accepted = 0
    left = list(guesses)
    while left:
        steps += 1
        for _ in range(num_drafted):
            if not left or not left[0]:
                break
            left.pop(0)
            accepted += 1
        if left:
            left.pop(0)  # the target's own
    return steps, accepted


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 9))
def test_steps_against_a_walk_by_hand(guesses: list[bool], num_drafted: int) -> None:
    steps, _ = by_hand(guesses, num_drafted)
    assert num_steps(guesses, num_drafted) == steps


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=5))
def test_statistics_are_of_all_prompts_together(rows: list[list[bool]]) -> None:
    found = summarize_acceptance(rows, max_tokens=30, data="x")
    num_tokens = sum(map(len, rows))
    assert found.alpha == pytest.approx(sum(map(sum, rows)) / num_tokens)
    for k in NUM_DRAFTED:
        assert found.tokens_per_step[k] == pytest.approx(num_tokens / sum(by_hand(row, k)[0] for row in rows))
    walks = [by_hand(row, 30) for row in rows]
    assert found.length == pytest.approx(sum(right for _, right in walks) / sum(steps for steps, _ in walks))
    assert bool(found.intervals) == (len(rows) > 1)


def test_a_ratios_interval_covers_it_as_often_as_it_says() -> None:
    import numpy as np

    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        below = draw.integers(1, 20, 60).astype(float)
        above = draw.binomial(below.astype(int), 0.3).astype(float)
        low, high = summarize_ratios({"x": (above, below)}, 200, seed).intervals["x"]
        covered += low <= 0.3 <= high
    assert 51 <= covered <= 60
