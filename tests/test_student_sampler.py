"""A student's own text by our engine: the right distribution, the weights of the right step, and runs that resume."""

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
from powertrain.checkpoint.tokenizer_files import hugging_face_files
from powertrain.cli import app
from powertrain.compress import compress
from powertrain.compress.manifest import read_manifest
from powertrain.compress.plain_model import load_plain_model
from powertrain.compress.prune_depth import depth_pruned
from powertrain.distill.batches import Batch, WindowBatches
from powertrain.distill.on_policy import OnPolicy
from powertrain.distill.quantized_student import quantized_student
from powertrain.distill.run import TextConfig, distill
from powertrain.distill.student import Student, dense_student
from powertrain.distill.teachers import LiveTeacher
from powertrain.distill.trainer import TrainConfig, Trainer
from powertrain.student_sampler import engine_refresh, sample_texts
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
PROMPTS = [[7, 8, 9], [20, 21, 22, 23], [7, 8, 9]]


def student_of(folder: Path) -> tuple[Student, dict[str, Any]]:
    checkpoint = open_checkpoint(folder)
    return dense_student(checkpoint), checkpoint.config


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_texts_are_drawn_from_the_students_distribution(tiny_model_dir: TinyModel, family: str) -> None:
    student, config = student_of(tiny_model_dir(family))
    prompts = [[7, 8, 9]] * 48
    written = engine_refresh(student, config, **CPU)()(prompts, 24, 5)
    assert [len(row) for row in written] == [24] * 48
    ids = torch.tensor([[*prompt, *row] for prompt, row in zip(prompts, written, strict=True)])
    with torch.no_grad():
        log_p = student.model(torch.float32).logits(ids)[:, 2:-1].double().log_softmax(-1)
    # a token's surprise is the entropy of what it was drawn from, on average
    surprise = -log_p.gather(2, ids[:, 3:, None]).squeeze(2)
    entropy = -(log_p.exp() * log_p).sum(-1)
    gap = surprise - entropy
    assert float(entropy.mean()) > 1
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / gap.numel() ** 0.5


def test_texts_follow_seed_row_and_weights_alone(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    student, config = student_of(tiny_model_dir("llama"))
    refresh = engine_refresh(student, config, **CPU)
    sample = refresh()
    first = sample(PROMPTS, 12, 1)
    assert first[0] != first[2]
    assert sample(PROMPTS, 12, 2) != first
    for name, tensor in student.parameters.items():  # as an optimizer does, in place
        tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    assert sample(PROMPTS, 12, 1) == first
    moved = refresh()(PROMPTS, 12, 1)
    assert moved != first
    tensors = student.stored(student.parameters, torch.float32)
    write_checkpoint(tmp_path / "moved", config, tensors, hugging_face_files(tiny_model_dir("llama")))
    read_back = load_model(open_checkpoint(tmp_path / "moved"), "cpu", torch.float32)
    assert sample_texts(read_back, PROMPTS, 12, 1) == moved


def test_a_quantized_student_writes_as_what_its_integers_stand_for(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    compress(tiny_model_dir("llama"), tmp_path / "w8", "W8A16", dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "w8")
    student = quantized_student(checkpoint)
    written = engine_refresh(student, checkpoint.config, **CPU)()(PROMPTS, 12, 1)
    with torch.no_grad():
        weights = student.model(torch.float32).weights
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    write_checkpoint(tmp_path / "floats", config, iter(weights.items()), hugging_face_files(tiny_model_dir("llama")))
    floats = load_model(open_checkpoint(tmp_path / "floats"), "cpu", torch.float32)
    assert sample_texts(floats, PROMPTS, 12, 1) == written


def trainer(folder: Path, refresh_every: int, out: Path | None = None) -> Trainer:
    source = open_checkpoint(folder)
    view = depth_pruned(source, [0, 2])
    student, ids = dense_student(view), torch.randint(5, 300, (400,), generator=torch.Generator().manual_seed(0))
    windows = WindowBatches(ids, length=12, batch_size=2)
    on_policy = OnPolicy(
        share=0.8, make_refresh=engine_refresh, num_prompt_tokens=4, refresh_every=refresh_every
    ).batches(windows, student, view.config, "cpu", torch.float32, seed=3)
    teacher = LiveTeacher(load_plain_model(source, "cpu", torch.float32))
    config = TrainConfig(steps=10, learning_rate=3e-2, evaluate_every=4)
    return Trainer(teacher, student, on_policy, Batch(windows.at(50).token_ids), config, folder=out)


@pytest.mark.parametrize(
    ("refresh_every", "pause_every", "is_same"), [(1, 1, True), (3, 3, True), (4, 1, False)], ids=str
)
def test_a_killed_run_resumes_as_it_was_from_where_weights_are_taken_anew(
    tiny_model_dir: TinyModel, tmp_path: Path, refresh_every: int, pause_every: int, is_same: bool
) -> None:
    folder = tiny_model_dir("mistral")
    expected = trainer(folder, refresh_every).run(pause_every=pause_every).losses

    def kill(_: str, done: float, __: float | None) -> None:
        if done > 0.75:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(folder, refresh_every, tmp_path).run(pause_every=pause_every, save_every=0.0, progress=kill)
    resumed = trainer(folder, refresh_every, tmp_path)
    assert resumed.history.step == 7 // pause_every * pause_every
    assert (resumed.run(pause_every=pause_every).losses == expected) == is_same


@pytest.fixture
def models(tiny_model_dir: TinyModel, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A teacher, the same without its middle block, and a text."""
    teacher = tiny_model_dir("mistral")
    pruned = depth_pruned(open_checkpoint(teacher), [0, 2])
    write_checkpoint(tmp_path / "pruned", pruned.config, iterate(pruned), hugging_face_files(teacher))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n}: the {n * 7 % 13} cats met {n * 5 % 11} dogs.\n" for n in range(200)))
    return teacher, tmp_path / "pruned", text


def test_the_command_line_samples_and_says_so(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = models
    flags = ["--data", str(text), "--steps", "6", "--length", "24", "--batch-size", "2", "--device", "cpu"]
    flags += ["--on-policy", "0.5", "--prompt-tokens", "8", "--refresh-every", "2", "--json", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, ["distill", str(teacher), str(student), str(tmp_path / "out"), *flags])
    assert done.exit_code == 0, done.output
    on_policy = {"share": 0.5, "num_prompt_tokens": 8, "refresh_every": 2}
    assert json.loads((tmp_path / "r.json").read_text())["on_policy"] == on_policy
    assert read_manifest(tmp_path / "out")["on_policy"] == on_policy


def test_what_does_not_go_together_is_refused(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = models

    def run(top_k: int | None = None, **own: Any) -> None:
        on_policy = OnPolicy(**{"share": 0.5, "make_refresh": engine_refresh, "num_prompt_tokens": 4, **own})
        cut, config = TextConfig(length=16, batch_size=2), TrainConfig(steps=1)
        distill(
            teacher, student, tmp_path / "x", data=[text], text=cut, config=config, on_policy=on_policy, top_k=top_k
        )

    for own, message in (
        ({"top_k": 4}, "stored teacher logits"),
        ({"num_prompt_tokens": 16}, "leave nothing of windows of 16"),
        ({"share": 1.2}, "share must be 0 to 1"),
        ({"refresh_every": 0}, "refresh_every must be 1"),
    ):
        with pytest.raises(PowertrainError, match=message):
            run(**own)
    assert not (tmp_path / "x").exists()
