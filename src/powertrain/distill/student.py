"""What is trained: a model's own weights, or the scales and integers of a quantized one, and how either is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.plain_decoder import Rotations, Weights
from powertrain.compress.plain_model import PlainModel, RunBlock, in_dtype, load_weights, run_block
from powertrain.model.families import ModelConfig, model_config

Parameters = Mapping[str, torch.Tensor]
Wanted = Callable[[str], bool]
"""Of a name, whether it is wanted."""

WeightsOf = Callable[[Parameters, Wanted], Weights]
"""(parameters, wanted) -> those weights of a model whose names are wanted, which take the parameters named alike."""

Stored = Callable[[Parameters, torch.dtype], Iterator[tuple[str, torch.Tensor]]]
"""(parameters, type of what is stored as floats) -> the tensors of a model folder."""


def dense_tensors(parameters: Parameters, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters themselves."""
    for name in sorted(parameters):
        yield name, parameters[name].to(dtype)


def dense_weights(parameters: Parameters, is_wanted: Wanted) -> Weights:
    """The parameters themselves."""
    return {name: tensor for name, tensor in parameters.items() if is_wanted(name)}


@dataclass(slots=True)
class Student:
    """Float32 parameters, what a model's weights are given them, and how they are stored: as they are by default.

    A quantized student's parameters are scales, say, and `weights` gives the rounded matrices. `are_weights`: whether
    the parameters are weights themselves.
    """

    config: ModelConfig
    parameters: dict[str, torch.Tensor]
    weights: WeightsOf = dense_weights
    stored: Stored = dense_tensors
    are_weights: bool = True
    turns: dict[int, Rotations] = field(default_factory=dict)

    def model(self, dtype: torch.dtype, *, run: RunBlock = run_block, recomputes: bool = False) -> PlainModel:
        """The model as it stands; gradients pass to the parameters."""
        weights = in_dtype(self.weights(self.parameters, lambda _: True), dtype)
        return PlainModel(self.config, weights, run=run, recomputes=recomputes, turns=self.turns)


def dense_student(
    checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> Student:
    """All weights of a float model are trained. dtype: until training begins; None is the file's."""
    return Student(model_config(checkpoint.config), load_weights(checkpoint, device, dtype))
