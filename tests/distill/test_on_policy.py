"""Batches that a sampler wrote: prompts kept, continuations counted, other steps untouched; and training on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.plain_model import load_plain_model
from powertrain.compress.prune_depth import depth_pruned
from powertrain.distill.batches import Batch, WindowBatches
from powertrain.distill.on_policy import OnPolicyBatches
from powertrain.distill.student import dense_student
from powertrain.distill.teachers import LiveTeacher
from powertrain.distill.trainer import TrainConfig, Trainer
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
BASE = WindowBatches(torch.randint(5, 300, (800,), generator=torch.Generator().manual_seed(0)), length=10, batch_size=3)


def count_up(prompts: list[list[int]], num_tokens: int, seed: int) -> list[list[int]]:
    """Each prompt's row number of tokens fewer than asked for."""
    return [[100 + row] * (num_tokens - row) for row in range(len(prompts))]


def test_what_was_written_counts_and_the_prompt_stays() -> None:
    batch = OnPolicyBatches(BASE, lambda: count_up, share=1.0, num_prompt_tokens=4).at(5)
    assert torch.equal(batch.token_ids[:, :4], BASE.at(5).token_ids[:, :4])
    assert batch.is_counted is not None
    for row in range(3):
        written = slice(4, 10 - row)
        assert (batch.token_ids[row, written] == 100 + row).all()
        # what predicts a written token counts, the last one predicts nothing
        assert batch.is_counted[row].nonzero().flatten().tolist() == list(range(3, 9 - row))


def test_a_share_of_the_steps_is_written_and_always_the_same_ones() -> None:
    batches = OnPolicyBatches(BASE, lambda: count_up, share=0.3, num_prompt_tokens=4, seed=1)
    written = [step for step in range(200) if batches.at(step).is_counted is not None]
    assert 30 < len(written) < 90
    assert written == [step for step in range(200) if batches.at(step).is_counted is not None]
    for step in set(range(10)) - set(written):
        assert torch.equal(batches.at(step).token_ids, BASE.at(step).token_ids)


def test_a_student_learns_from_its_own_samples(tiny_model_dir: TinyModel) -> None:
    source = open_checkpoint(tiny_model_dir("mistral"))
    student = dense_student(depth_pruned(source, [0, 2]))

    @torch.no_grad()
    def sample(prompts: list[list[int]], num_tokens: int, seed: int) -> Sequence[Sequence[int]]:
        draw, ids = torch.Generator().manual_seed(seed), torch.tensor(prompts)
        for _ in range(num_tokens):
            probabilities = student.model(torch.float32).logits(ids)[:, -1].softmax(-1)
            ids = torch.cat((ids, torch.multinomial(probabilities, 1, generator=draw)), dim=1)
        return ids[:, len(prompts[0]) :].tolist()

    def trainer() -> Trainer:
        batches = OnPolicyBatches(BASE, lambda: sample, share=0.5, num_prompt_tokens=4)
        teacher = LiveTeacher(load_plain_model(source, "cpu", torch.float32))
        config = TrainConfig(steps=30, learning_rate=3e-3, evaluate_every=15)
        return Trainer(teacher, student, batches, Batch(BASE.at(70).token_ids), config)

    history = trainer().run()
    assert history.curve[-1]["held_out_kl"] < history.curve[0]["held_out_kl"]


def test_answers_that_do_not_fit_are_refused() -> None:
    for sample, name in ((lambda *_: [[1]], "1 continuations for 3"), (lambda *_: [[], [], []], "no token")):
        with pytest.raises(PowertrainError, match=name):
            OnPolicyBatches(BASE, lambda given=sample: given, share=1.0, num_prompt_tokens=4).at(0)
    with pytest.raises(PowertrainError, match="leave nothing"):
        OnPolicyBatches(BASE, lambda: count_up, share=1.0, num_prompt_tokens=10).at(0)
    with pytest.raises(PowertrainError, match="share"):
        OnPolicyBatches(BASE, lambda: count_up, share=1.5, num_prompt_tokens=4)
