"""Products whose input is rounded to 8-bit integers first, as W8A8 and W4A8 checkpoints ask for."""

from __future__ import annotations

import torch

from powertrain.model.weights import WeightFormat

LARGEST, SMALLEST = 127, -128


def round_to_int8(x: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
    """x [rows, n] with each row, or each group of a row, on its own grid of 256 steps; same shape and dtype.

    The grid is compressed-tensors' dynamic symmetric one: scale = absmax / 127.5, integers clamped to [-128, 127].
    """
    rows, size = x.shape
    groups = x.float().view(rows, -1, group_size or size)
    scale = groups.abs().amax(dim=-1, keepdim=True) / ((LARGEST - SMALLEST) / 2)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (torch.round(groups / scale).clamp_(SMALLEST, LARGEST) * scale).view(rows, size).to(x.dtype)


class QuantizedInput:
    """A weight format behind `round_to_int8`: what the integers mean, computed in floats.

    The native kernels multiply the integers themselves, with one scale per 32 inputs of a row.
    """

    def __init__(self, weight: WeightFormat, group_size: int | None) -> None:
        """group_size: inputs that share a scale; None for one scale per row."""
        self._weight, self._group_size = weight, group_size
        self.name, self.out_features = f"{weight.name} a8", weight.out_features

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return self._weight.matmul(round_to_int8(x, self._group_size))

    def unpack(self) -> torch.Tensor:
        return self._weight.unpack()

    def step_bytes(self) -> int:
        return self._weight.step_bytes()

    def nbytes(self) -> int:
        return self._weight.nbytes()
