"""Quantization-aware distillation: it starts at the checkpoint's bits, stores what was trained and lowers the KL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from powertrain.checkpoint.quantized import load_quantized
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress import compress
from powertrain.compress.plain_model import load_plain_model
from powertrain.distill.batches import Batch, WindowBatches
from powertrain.distill.quantized_student import EXPONENTS, STEPS, QuantizedLayer, Trains, quantized_student
from powertrain.distill.run import TextConfig, distill
from powertrain.distill.teachers import LiveTeacher
from powertrain.distill.trainer import Compute, TrainConfig, Trainer
from powertrain.model.weights import IntWeight
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
TRAINS: tuple[Trains, ...] = ("scales", "weights")


def tokens(num: int, seed: int) -> torch.Tensor:
    return torch.randint(5, 300, (num,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["W2A16_ASYM", "W4A16", "W8A8"])
def quantized(request: pytest.FixtureRequest, tiny_model_dir: TinyModel, tmp_path: Path) -> tuple[Path, Path]:
    """A float model and the same rounded to nearest."""
    step = {"match": "Linear", "scheme": request.param, "group_size": "channel" if request.param == "W8A8" else 32}
    compress(tiny_model_dir("qwen2"), tmp_path / "quantized", {"steps": [step]})
    return tiny_model_dir("qwen2"), tmp_path / "quantized"


@pytest.mark.parametrize("trains", TRAINS)
def test_training_begins_at_the_checkpoint_and_is_stored_as_it_is(
    quantized: tuple[Path, Path], tmp_path: Path, trains: Trains
) -> None:
    teacher, pupil = map(open_checkpoint, quantized)
    student = quantized_student(pupil, trains, teacher=teacher)
    write_checkpoint(tmp_path / "again", pupil.config, student.stored(student.parameters, torch.bfloat16))
    again = open_checkpoint(tmp_path / "again")
    assert again.names() == pupil.names()
    for name in pupil.names():
        assert torch.equal(again.load(name), pupil.load(name)), name
    source = torch.Generator().manual_seed(5)
    for name, tensor in student.parameters.items():
        student.parameters[name] = tensor + 0.2 * torch.randn(tensor.shape, generator=source)
    weights = student.model(torch.float32).weights
    write_checkpoint(tmp_path / "moved", pupil.config, student.stored(student.parameters, torch.bfloat16))
    moved, config = open_checkpoint(tmp_path / "moved"), student.config
    for name, shape in config.linear_shapes().items():
        matrix = load_quantized(moved, f"model.layers.1.{name}", shape)
        assert matrix is not None
        assert isinstance(matrix.weight, IntWeight)
        assert torch.equal(matrix.weight.dequantize(), weights[f"model.layers.1.{name}.weight"]), name


@pytest.mark.parametrize("trains", TRAINS)
def test_training_lowers_the_kl_of_two_bits(tiny_model_dir: TinyModel, tmp_path: Path, trains: Trains) -> None:
    step = {"match": "Linear", "scheme": "W2A16_ASYM", "group_size": 32, "observer": "mse"}
    compress(tiny_model_dir("llama"), tmp_path / "two_bits", {"steps": [step]})
    teacher, pupil = open_checkpoint(tiny_model_dir("llama")), open_checkpoint(tmp_path / "two_bits")
    student = quantized_student(pupil, trains, teacher=teacher)
    trainer = Trainer(
        LiveTeacher(load_plain_model(teacher, "cpu", torch.float32)),
        student,
        WindowBatches(tokens(6000, 0), length=32, batch_size=8),
        Batch(tokens(640, 1).view(-1, 32)),
        TrainConfig(steps=60, learning_rate=1e-2, evaluate_every=30),
        compute=Compute(positions_at_once=256),
    )
    history = trainer.run()
    first, *_, last = [row["held_out_kl"] for row in history.curve]
    assert last < (0.9 if trains == "scales" else 0.7) * first
    changed = [name for name, tensor in trainer.best_parameters().items() if tensor.abs().sum() > 0]
    assert any(name.endswith(EXPONENTS) for name in changed)
    assert any(name.endswith(STEPS) for name in student.parameters) == (trains == "weights")


def test_gradients_are_those_of_the_definition() -> None:
    """Of the scales exactly; of the integers straight through, and none beyond half a step outside of the grid."""
    start = IntWeight(
        values=torch.tensor([[-8, 7, 3, -2]], dtype=torch.int8),
        scale=torch.tensor([[0.5, 0.25]]),
        zero_point=torch.tensor([[1, -2]], dtype=torch.int8),
        num_bits=4,
    )
    layer = QuantizedLayer("layer", start, "pack-quantized")
    exponents = torch.tensor([[0.1, -0.2]], requires_grad=True)
    steps = torch.tensor([[-9.6, 6.2, 5.3, 0.1]], requires_grad=True)  # q - z is in -9..6 and -6..9
    weight = layer.weight({"layer.log_scale": exponents, "layer.steps": steps})
    scale = torch.tensor([0.5, 0.5, 0.25, 0.25]) * torch.tensor([0.1, 0.1, -0.2, -0.2]).exp()
    torch.testing.assert_close(weight[0], scale * torch.tensor([-9.0, 6.0, 5.0, 0.0]))
    towards = torch.tensor([1.0, -2.0, 3.0, 0.5])
    (weight[0] * towards).sum().backward()
    torch.testing.assert_close(steps.grad, (scale * towards * torch.tensor([0.0, 1, 1, 1])).unsqueeze(0))
    by_group = (weight.detach()[0] * towards).view(2, 2).sum(1)
    torch.testing.assert_close(exponents.grad, by_group.unsqueeze(0))
    stored = layer.integers({"layer.log_scale": exponents, "layer.steps": steps})
    assert stored.values.tolist() == [[-8, 7, 3, -2]]


def test_the_integers_begin_on_their_side_of_the_border_of_the_floats(quantized: tuple[Path, Path]) -> None:
    teacher, pupil = map(open_checkpoint, quantized)
    with_floats = quantized_student(pupil, "weights", teacher=teacher).parameters
    without = quantized_student(pupil, "weights").parameters
    for name, tensor in with_floats.items():
        if name.endswith(STEPS):
            assert torch.equal(tensor.round(), without[name])
            assert 0 < float((tensor - without[name]).abs().max()) <= 0.4501


def test_the_command_keeps_a_quantized_student_quantized(quantized: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n}: the {n * 7 % 13} cats met {n * 5 % 11} dogs.\n" for n in range(600)))
    settings: Any = {"data": [text], "config": TrainConfig(steps=2), "text": TextConfig(length=64)}
    report = distill(*quantized, tmp_path / "out", **settings, trains="weights")
    assert report.manifest["trains"] == "weights"
    before, after = open_checkpoint(quantized[1]), open_checkpoint(tmp_path / "out")
    assert after.config == before.config
    assert after.names() == before.names()
    assert [after.load(name).dtype for name in after.names()] == [before.load(name).dtype for name in before.names()]
    with pytest.raises(PowertrainError, match="teacher"):
        distill(quantized[1], quantized[0], tmp_path / "no", **settings)


def test_a_float_checkpoint_is_no_quantized_student(tiny_model_dir: TinyModel) -> None:
    with pytest.raises(PowertrainError, match="no quantized matrix"):
        quantized_student(open_checkpoint(tiny_model_dir("llama")))
