"""Distillation from files to a folder, in Python and by the command line: paused, resumed, written, described."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import iterate, open_checkpoint
from powertrain.checkpoint.tokenizer_files import hugging_face_files, load_tokenizer
from powertrain.cli import app
from powertrain.compress.manifest import read_manifest
from powertrain.compress.prune_depth import depth_pruned
from powertrain.distill.run import TextConfig, distill, documents
from powertrain.distill.trainer import TrainConfig
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]


@pytest.fixture
def models(tiny_model_dir: TinyModel, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A teacher, the same without its middle block, and a text."""
    teacher = tiny_model_dir("mistral")
    pruned = depth_pruned(open_checkpoint(teacher), [0, 2])
    write_checkpoint(tmp_path / "pruned", pruned.config, iterate(pruned), hugging_face_files(teacher))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n}: the {n * 7 % 13} cats met {n * 5 % 11} dogs.\n" for n in range(400)))
    return teacher, tmp_path / "pruned", text


def run(models: tuple[Path, Path, Path], out: Path, **own: Any) -> Any:
    teacher, student, text = models
    own.setdefault("config", TrainConfig(steps=10, learning_rate=2e-3, evaluate_every=5))
    return distill(teacher, student, out, data=[text], text=TextConfig(length=32, batch_size=4), **own)


def test_a_paused_run_goes_on_and_leaves_one_folder_nearer_to_the_teacher(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "healed"
    paused = run(models, out, max_seconds=0.0)
    assert paused.history.ended is None
    assert "run the same command again" in paused.summary()
    assert not out.exists()
    report = run(models, out, dtype="float32")
    assert report.history.ended == "steps"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healed", "pruned", "text.txt"]
    manifest = read_manifest(out)
    assert manifest["kind"] == "distillation"
    assert [row["step"] for row in manifest["curve"]] == [0, 5, 10]
    assert manifest["sha256"].keys() == {"teacher", "student", "held_out"}
    ids = torch.tensor(load_tokenizer(out).encode(models[2].read_text()[:300]))
    log_p, before, after = (
        load_model(open_checkpoint(path), "cpu", torch.float32).score(ids).log_softmax(-1)
        for path in (models[0], models[1], out)
    )
    kls = [float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) for log_q in (before, after)]
    assert kls[1] < kls[0]


def test_the_same_command_gives_the_same_bytes_with_and_without_a_pause(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    run(models, tmp_path / "one")
    run(models, tmp_path / "two", max_seconds=0.0)
    run(models, tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_command_line_trains_writes_and_tells(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = models
    flags = ["--data", str(text), "--held-out", str(text), "--steps", "4", "--length", "32", "--batch-size", "2"]
    flags += ["--loss", "jsd", "--beta", "0.3", "--evaluate-every", "2", "--device", "cpu", "--dtype", "float32"]
    flags += ["--json", str(tmp_path / "record.json")]
    done = CliRunner().invoke(app, ["distill", str(teacher), str(student), str(tmp_path / "out"), *flags])
    assert done.exit_code == 0, done.output
    assert "held-out KL" in done.output
    made = json.loads((tmp_path / "record.json").read_text())
    assert made["config"]["divergence"] == {"kind": "jsd", "temperature": 1.0, "beta": 0.3}
    # the held-out text is the training text here, and the manifest says so
    assert made["training_13grams_in_held_out_text"] > 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_models_that_do_not_fit_and_taken_folders_are_refused(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, _ = models
    other = open_checkpoint(student)
    tensors = (
        (name, other.load(name)[:100] if other.shape(name)[0] == 320 else other.load(name)) for name in other.names()
    )
    write_checkpoint(tmp_path / "small", {**other.config, "vocab_size": 100}, tensors, hugging_face_files(teacher))
    with pytest.raises(PowertrainError, match="share a vocabulary"):
        run((teacher, tmp_path / "small", models[2]), tmp_path / "out")
    with pytest.raises(PowertrainError, match="already holds"):
        run(models, student)
    (tmp_path / "short.txt").write_text("No.")
    with pytest.raises(PowertrainError, match="shorter than one window"):
        run(models, tmp_path / "out", held_out=tmp_path / "short.txt")
    long = TextConfig(length=999)
    with pytest.raises(PowertrainError, match="2 to 512 tokens"):
        distill(teacher, student, tmp_path / "out", data=[models[2]], config=TrainConfig(steps=1), text=long)
    assert not (tmp_path / "out").exists()


def test_marks_between_articles_are_not_text() -> None:
    text = '<doc id="1" title="A">\nA\n\nabc\n</doc>\n<doc id="2">\nB\ndef\n</doc>\n'
    assert documents(text) == ["A\n\nabc\n", "B\ndef\n"]
    assert documents("plain\ntext") == ["plain\ntext"]


def test_stored_logits_teach_nearly_what_the_live_teacher_does(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    paused = run(models, tmp_path / "stored", top_k=300, max_seconds=0.0)
    assert paused.history.ended is None
    assert (tmp_path / "stored.training" / "teacher-logits" / "teacher_logits.json").is_file()
    report = run(models, tmp_path / "stored", top_k=300)
    live = run(models, tmp_path / "live")
    # the same windows at the start; later epochs cut them elsewhere
    assert report.history.losses[0] == pytest.approx(live.history.losses[0], rel=0.5)
    assert report.history.losses[-1] < report.history.losses[0]
    assert report.manifest["top_k"] == 300
    assert not (tmp_path / "stored.training").exists()
