"""Products whose input is rounded to 8-bit integers first, as W8A8 and W4A8 checkpoints ask for."""

from __future__ import annotations

import torch

from powertrain.kernels.rounding import Rounded, quantize_to_int8
from powertrain.model.weights import Int8Channel, WeightFormat


def round_to_int8(x: torch.Tensor, group_size: int | None = None) -> torch.Tensor:
    """x [rows, n] with each row, or each group of a row, on its own grid of 256 steps; same shape and dtype."""
    values, scale = quantize_to_int8(x, group_size)
    rows, groups = scale.shape
    return (values.float().view(rows, groups, -1) * scale.unsqueeze(-1)).view(rows, -1).to(x.dtype)


class QuantizedInput:
    """A weight format behind `round_to_int8`: what the integers mean, computed in floats.

    The native kernels multiply the integers themselves, with one scale per 32 inputs of a row, and so does a GPU where
    a row has one scale.
    """

    def __init__(self, weight: WeightFormat, group_size: int | None) -> None:
        """group_size: inputs that share a scale; None for one scale per row."""
        self.weight, self._group_size = weight, group_size
        self.name, self.out_features = f"{weight.name} a8", weight.out_features

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        if self.rounded_dtype() is not None:
            assert isinstance(self.weight, Int8Channel)
            return self.weight.rounding_matmul(x)
        return self.weight.matmul(round_to_int8(x, self._group_size))

    def rounded_dtype(self) -> torch.dtype | None:
        """int8 where the integers are multiplied as such."""
        is_int8 = (
            self._group_size is None and isinstance(self.weight, Int8Channel) and self.weight.multiplies_integers()
        )
        return torch.int8 if is_int8 else None

    def matmul_rounded(self, x: Rounded, keeps_pieces: bool = False) -> torch.Tensor:
        """x [rows, in], rounded already, times the transposed matrix."""
        assert isinstance(self.weight, Int8Channel)
        return self.weight.matmul_rounded(x, keeps_pieces)

    def gated_rounded(self, x: Rounded, to: torch.dtype) -> Rounded:
        """x [rows, in], rounded already, times the transposed matrix, gated and rounded."""
        assert isinstance(self.weight, Int8Channel)
        return self.weight.gated_rounded(x, to)

    def unpack(self) -> torch.Tensor:
        return self.weight.unpack()

    def step_bytes(self) -> int:
        return self.weight.step_bytes()

    def nbytes(self) -> int:
        return self.weight.nbytes()
