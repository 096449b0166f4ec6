"""Quantization-aware distillation: a student of integers whose scales are trained, and the integers too if wanted.

A matrix is (q - z) * s0 * exp(p). The exponents p, one for each group, begin at zero; so a step changes a scale by a
share of itself. Integers are those of the checkpoint, or round(u) of a trained u in units of grid steps, whose rounding
gradients pass straight through (Bengio et al. 2013, arXiv 1308.3432), up to half a step beyond the grid. What the
forward pass multiplies is what will be stored: scales are rounded to their stored type, gradients again unchanged.
Trained scales: Esser et al. 2020 (LSQ, arXiv 1902.08153). Distillation as the loss: arXiv 2601.20088.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from powertrain.checkpoint.compressed_tensors import PACKED, PLAIN, int_weight_tensors
from powertrain.checkpoint.quantized import load_quantized
from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.plain_model import HEAD
from powertrain.compress.quantize import weight_error
from powertrain.distill.student import Parameters, Student, Wanted
from powertrain.model.families import ModelConfig, model_config
from powertrain.model.weights import IntWeight
from powertrain.types import PowertrainError

Trains = Literal["scales", "weights"]

EXPONENTS, STEPS = "log_scale", "steps"
"""What a layer's trained tensors are called, after its name."""

LARGEST_OFFSET = 0.45
"""Grid steps between an integer and where its trained number begins: on its side of the rounding border."""

MAX_ERROR = 0.5
"""Normalised squared error above which a float matrix is not what the integers were rounded from (a rotated one)."""


@dataclass(frozen=True, slots=True)
class QuantizedLayer:
    """One matrix: as the checkpoint has it, its scheme's storage, and the trained parameters' names."""

    name: str
    start: IntWeight
    storage: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """[out, groups, group size]."""
        out_features, in_features = self.start.values.shape
        groups = self.start.scale.shape[1]
        return out_features, groups, in_features // groups

    def scale(self, parameters: Parameters) -> torch.Tensor:
        """Float32 [out, groups] as it will be stored."""
        scale = self.start.scale.float()
        scale = scale * parameters[f"{self.name}.{EXPONENTS}"].to(scale.device).exp()
        return scale + (scale.to(self.start.scale.dtype).float() - scale).detach()

    def steps(self, parameters: Parameters) -> torch.Tensor:
        """q - z, float32 [out, groups, group size]."""
        trained = parameters.get(f"{self.name}.{STEPS}")
        if trained is None:
            return _centred(self.start).view(self.shape)
        low, high = _bounds(self.start)
        # a number may move as far out as still rounds to the grid: at 2 bits, half of all stand at its ends
        trained = trained.to(self.start.values.device).view(self.shape)
        inside = torch.minimum(torch.maximum(trained, low - 0.5), high + 0.5)
        rounded = torch.minimum(torch.maximum(inside.round(), low), high)
        return inside + (rounded - inside).detach()

    def weight(self, parameters: Parameters) -> torch.Tensor:
        """The matrix, float32 [out, in]."""
        return (self.steps(parameters) * self.scale(parameters).unsqueeze(-1)).view(self.start.values.shape)

    def integers(self, parameters: Parameters) -> IntWeight:
        """What is stored."""
        steps, zero = self.steps(parameters), self.start.zero_point
        values = steps if zero is None else steps + zero.float().unsqueeze(-1)
        return self.start._replace(
            values=values.round().to(torch.int8).view(self.start.values.shape),
            scale=self.scale(parameters).to(self.start.scale.dtype),
        )


def quantized_student(
    checkpoint: Checkpoint, trains: Trains = "scales", *, teacher: Checkpoint | None = None, device: Any = "cpu"
) -> Student:
    """The student that an integer checkpoint is; training begins at exactly its weights.

    trains "scales": one number for each group. "weights": the integers and the norms too; where `teacher` holds the
    floats that were rounded, each integer begins as far from the rounding border as its float was. Raises
    `PowertrainError` for a checkpoint without integers, with other formats, or reordered columns.
    """
    config = model_config(checkpoint.config)
    layers = {layer.name: layer for layer in _layers(checkpoint, config, device)}
    own = tuple(f"{name}." for name in layers)
    skipped = HEAD if config.ties_embeddings else ""
    dense = {
        name: checkpoint.load(name).to(device=device, dtype=torch.float32)
        for name in checkpoint.names()
        if not (name.startswith(own) and not name.endswith(".bias")) and name != skipped
    }
    parameters = {f"{name}.{EXPONENTS}": torch.zeros_like(layer.start.scale.float()) for name, layer in layers.items()}
    if trains == "weights":
        parameters |= {f"{name}.{STEPS}": _first_steps(layer, teacher) for name, layer in layers.items()}
        parameters |= {name: tensor for name, tensor in dense.items() if tensor.dim() == 1}

    def weights(current: Parameters, is_wanted: Wanted) -> dict[str, torch.Tensor]:
        made = {f"{name}.weight": layer.weight(current) for name, layer in layers.items() if is_wanted(name)}
        return {**{name: current.get(name, tensor) for name, tensor in dense.items() if is_wanted(name)}, **made}

    def stored(current: Parameters, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(dense):
            yield name, current.get(name, dense[name]).to(checkpoint.load(name).dtype)
        for name, layer in layers.items():
            yield from int_weight_tensors(name, layer.integers(current), layer.storage).items()

    return Student(config, parameters, weights, stored, are_weights=False)


def _layers(checkpoint: Checkpoint, config: ModelConfig, device: Any) -> Iterator[QuantizedLayer]:
    shapes = {
        f"model.layers.{index}.{layer}": shape
        for index in range(config.num_layers)
        for layer, shape in config.linear_shapes().items()
    }
    if not config.ties_embeddings:
        shapes["lm_head"] = (config.vocab_size, config.hidden_size)
    names = set(checkpoint.names())
    found = 0
    for name, shape in shapes.items():
        matrix = load_quantized(checkpoint, name, shape)
        if matrix is None:
            continue
        weight = matrix.weight
        if not isinstance(weight, IntWeight) or weight.input_order is not None:
            raise PowertrainError(f"{checkpoint.path}: {name} is not stored as integers in order, which can be trained")
        found += 1
        placed = weight._replace(
            values=weight.values.to(device),
            scale=weight.scale.to(device),
            zero_point=None if weight.zero_point is None else weight.zero_point.to(device),
        )
        yield QuantizedLayer(name, placed, PLAIN if f"{name}.weight" in names else PACKED)
    if not found:
        raise PowertrainError(f"{checkpoint.path}: holds no quantized matrix whose scales could be trained")


def _centred(weight: IntWeight) -> torch.Tensor:
    """q - z, float32 [out, in]."""
    out_features, in_features = weight.values.shape
    values = weight.values.float().view(out_features, weight.scale.shape[1], -1)
    if weight.zero_point is not None:
        values = values - weight.zero_point.float().unsqueeze(-1)
    return values.view(out_features, in_features)


def _bounds(weight: IntWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest q - z, float32 [out, groups, 1] or []."""
    zero = 0.0 if weight.zero_point is None else weight.zero_point.float().unsqueeze(-1)
    low, high = -(2 ** (weight.num_bits - 1)), 2 ** (weight.num_bits - 1) - 1
    device = weight.values.device
    return torch.as_tensor(low - zero, device=device), torch.as_tensor(high - zero, device=device)


def _first_steps(layer: QuantizedLayer, teacher: Checkpoint | None) -> torch.Tensor:
    """Where the trained integers of a layer begin, float32 [out, in]: they round to those it has."""
    centred, name = _centred(layer.start), f"{layer.name}.weight"
    if teacher is None or name not in teacher.names() or tuple(teacher.shape(name)) != tuple(centred.shape):
        return centred
    original = teacher.load(name).to(device=centred.device, dtype=torch.float32)
    if weight_error(original, layer.start.dequantize()) > MAX_ERROR:
        return centred
    scale = layer.start.scale.float().unsqueeze(-1)
    exact = (original.view(layer.shape) / scale.where(scale > 0, 1.0)).view_as(centred)
    return centred + (exact - centred).clamp(-LARGEST_OFFSET, LARGEST_OFFSET)
