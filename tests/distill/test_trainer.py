"""Training: it lowers the held-out KL; stopped anywhere and resumed it gives the same bits; bad states are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.plain_model import load_plain_model
from powertrain.compress.prune_depth import depth_pruned
from powertrain.distill.batches import Batch, WindowBatches
from powertrain.distill.losses import Divergence
from powertrain.distill.parallel import Processes
from powertrain.distill.student import dense_student
from powertrain.distill.teachers import LiveTeacher
from powertrain.distill.trainer import Compute, TrainConfig, Trainer, hidden_pairs
from powertrain.types import ModelFileError, PowertrainError

TinyModel = Callable[[str], Path]
CONFIG = TrainConfig(steps=12, learning_rate=1e-3, warmup=0.2, evaluate_every=4)


def text(num: int, seed: int) -> torch.Tensor:
    """Tokens with something to learn: each follows from the one before, most of the time."""
    source = torch.Generator().manual_seed(seed)
    noise = torch.randint(5, 300, (num,), generator=source)
    tokens = [7]
    for at in range(1, num):
        tokens.append((tokens[-1] * 5 + 3) % 290 + 5 if at % 4 else int(noise[at]))
    return torch.tensor(tokens)


def trainer(
    folder: Path, config: TrainConfig = CONFIG, out: Path | None = None, compute: Compute | None = None, **own: Any
) -> Trainer:
    source = open_checkpoint(folder)
    pruned = depth_pruned(source, range(int(source.config["num_hidden_layers"]) - 1))
    student = dense_student(pruned)
    return Trainer(
        own.pop("teacher", None) or LiveTeacher(load_plain_model(source, "cpu", torch.float32)),
        student,
        own.pop("batches", WindowBatches(text(700, 0), length=24, batch_size=4, seed=3)),
        own.pop("held_out", Batch(text(192, 1).view(-1, 24))),
        config,
        folder=out,
        compute=compute or Compute(positions_at_once=50),
        **own,
    )


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_training_lowers_the_held_out_kl(tiny_model_dir: TinyModel, kind: Any) -> None:
    config = replace(CONFIG, steps=100, learning_rate=4e-3, evaluate_every=50, divergence=Divergence(kind))
    batches = WindowBatches(text(4000, 0), length=24, batch_size=8)
    history = trainer(tiny_model_dir("llama"), config, batches=batches).run()
    first, *_, last = [row["held_out_kl"] for row in history.curve]
    assert last < 0.8 * first
    assert (history.step, history.ended, len(history.losses)) == (100, "steps", 100)


@pytest.mark.parametrize("pauses", [(5,), (4, 9)])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(
    tiny_model_dir: TinyModel, tmp_path: Path, pauses: tuple[int, ...]
) -> None:
    whole = trainer(tiny_model_dir("qwen3"))
    expected = whole.run()
    for pause in pauses:
        paused = trainer(tiny_model_dir("qwen3"), out=tmp_path)
        original, count = paused._step, pause

        def stop_after(rate: float, step: Any = original, last: int = count, of: Trainer = paused) -> None:
            step(rate)
            if of.history.step == last:
                raise KeyboardInterrupt

        paused._step = stop_after  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            paused.run()
        paused.save()
    resumed = trainer(tiny_model_dir("qwen3"), out=tmp_path)
    assert resumed.history.step == pauses[-1]
    found = resumed.run()
    assert found.losses == expected.losses
    assert [row["held_out_kl"] for row in found.curve] == [row["held_out_kl"] for row in expected.curve]
    for name, tensor in whole.best_parameters().items():
        assert torch.equal(resumed.best_parameters()[name], tensor), name


def test_time_ends_a_command_with_a_state_and_the_next_goes_on(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    first = trainer(tiny_model_dir("llama"), out=tmp_path).run(max_seconds=0.0)
    assert first.ended is None
    assert first.step == 0
    second = trainer(tiny_model_dir("llama"), out=tmp_path).run()
    assert second.ended == "steps"
    assert trainer(tiny_model_dir("llama"), out=tmp_path).run().step == 12  # over: nothing more is trained
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000012"]


def test_a_run_bounded_by_seconds_ends_by_them(tiny_model_dir: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(Processes, "clock", lambda self: float(next(ticks)))
    history = trainer(tiny_model_dir("llama"), TrainConfig(seconds=5.0, evaluate_every=1000)).run()
    assert history.ended == "seconds"
    assert history.step == 4  # the fifth tick after the first is the end
    assert history.curve[-1]["step"] == history.step


def test_recomputed_activations_give_the_same_bits(tiny_model_dir: TinyModel) -> None:
    plain = trainer(tiny_model_dir("mistral")).run()
    again = trainer(tiny_model_dir("mistral"), compute=Compute(positions_at_once=50, recomputes=True)).run()
    assert again.losses == plain.losses


def test_the_best_parameters_are_kept_when_later_ones_are_worse(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    config = TrainConfig(steps=30, learning_rate=0.5, warmup=0.9, evaluate_every=2, patience=2)
    run = trainer(tiny_model_dir("llama"), config, out=tmp_path)
    history = run.run()
    assert history.ended == "early stop"
    kls = [row["held_out_kl"] for row in history.curve]
    assert history.best_kl == min(kls) < kls[-1]
    resumed = trainer(tiny_model_dir("llama"), config, out=tmp_path)
    for name, tensor in run.best_parameters().items():
        assert torch.equal(resumed.best_parameters()[name], tensor)
    resumed._student.parameters = {n: t.requires_grad_() for n, t in resumed.best_parameters().items()}
    assert resumed.held_out_kl() == history.best_kl


def test_hidden_loss_brings_the_streams_together(tiny_model_dir: TinyModel) -> None:
    pairs = hidden_pairs((0, 1), 3)
    assert pairs == ((0, 0), (1, 2))
    config = replace(CONFIG, steps=30, hidden_weight=1.0, hidden_pairs=pairs)
    losses = trainer(tiny_model_dir("mistral"), config).run().losses
    plain = trainer(tiny_model_dir("mistral"), replace(CONFIG, steps=30)).run().losses
    assert losses[0] > plain[0]
    assert losses[-1] < losses[0]


def test_positions_that_are_not_counted_teach_nothing(tiny_model_dir: TinyModel) -> None:
    class Masked(WindowBatches):
        def at(self, step: int) -> Batch:
            batch = super().at(step)
            is_counted = torch.zeros_like(batch.token_ids, dtype=torch.bool)
            is_counted[:, :8] = True
            changed = batch.token_ids.clone()
            changed[:, 8:] = self.filler  # causal: what follows cannot matter
            return Batch(changed, is_counted)

        filler = 11

    class Other(Masked):
        filler = 200

    made = [kind(text(700, 0), length=24, batch_size=4, seed=3) for kind in (Masked, Other)]
    one, other = (trainer(tiny_model_dir("llama"), batches=batches).run().losses for batches in made)
    assert one == pytest.approx(other, rel=1e-5)


def test_the_state_of_another_run_is_refused_by_the_setting(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    trainer(tiny_model_dir("llama"), out=tmp_path).run(max_seconds=0.0)
    with pytest.raises(PowertrainError, match="another config"):
        trainer(tiny_model_dir("llama"), replace(CONFIG, learning_rate=0.1), out=tmp_path)
    batches = WindowBatches(text(700, 9), length=24, batch_size=4, seed=3)
    with pytest.raises(PowertrainError, match="another data"):
        trainer(tiny_model_dir("llama"), out=tmp_path, batches=batches)
    with pytest.raises(PowertrainError, match="another teacher"):
        trainer(tiny_model_dir("llama"), out=tmp_path, identity={"teacher": "abc"})


def test_damaged_states_are_refused_by_file(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    trainer(tiny_model_dir("llama"), out=tmp_path).run(max_seconds=0.0)
    [state] = tmp_path.iterdir()
    weights = state / "parameters.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelFileError, match="parameters"):
        trainer(tiny_model_dir("llama"), out=tmp_path)
    weights.write_bytes(whole)
    (state / "state.json").write_text(
        json.dumps({"identity": json.loads((state / "state.json").read_text())["identity"]})
    )
    with pytest.raises(ModelFileError, match="training state"):
        trainer(tiny_model_dir("llama"), out=tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_state(
    tiny_model_dir: TinyModel, tmp_path: Path
) -> None:
    run = trainer(tiny_model_dir("llama"), replace(CONFIG, steps=200, learning_rate=1e30, warmup=0.0), out=tmp_path)
    with pytest.raises(PowertrainError, match="not a number"):
        run.run()
    assert not list(tmp_path.iterdir())


def test_windows_of_an_epoch_are_each_seen_once_and_cut_anew_in_the_next() -> None:
    run = torch.arange(100)
    batches = WindowBatches(run, length=10, batch_size=3, seed=1)
    seen = torch.cat([batches.at(step).token_ids for step in range(6)])
    assert batches.num_windows == 9
    for epoch in (seen[:9], seen[9:]):
        assert len(epoch.unique()) == 90
    assert int(seen[:9].min()) != int(seen[9:].min())
    assert torch.equal(batches.at(0).token_ids, seen[:3])  # asked for again, out of order
    other = WindowBatches(run, length=10, batch_size=3, seed=2)
    assert other.sha256 != batches.sha256


def test_too_little_text_and_a_run_without_end_are_refused() -> None:
    with pytest.raises(PowertrainError, match="too few"):
        WindowBatches(torch.arange(50), length=10, batch_size=5)
    with pytest.raises(PowertrainError, match="needs an end"):
        TrainConfig()
