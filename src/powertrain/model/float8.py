"""8-bit floats (e4m3, Micikevicius et al. 2022, arXiv 2209.05433): W8A8 per channel and in blocks of 128 by 128."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from powertrain.kernels.quantized import (
    FLOAT8_BLOCK,
    dequantize_float8,
    float8_linear,
    rounded_gated_linear,
    rounded_linear,
)
from powertrain.kernels.rounding import LARGEST_FLOAT8, Rounded


class Float8Weight(NamedTuple):
    """A matrix of 8-bit floats before it goes to its device: `weight = values * scale`.

    values: float8_e4m3fn [out, in]; scale: float32 [out], one for each output, or [ceil(out / 128), ceil(in / 128)],
    one for each block.
    """

    values: torch.Tensor
    scale: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in], computed in float32 and rounded once."""
        return dequantize_float8(self.values, self.scale).to(dtype)


class Float8:
    """8-bit floats with a scale for each output or block. `rounds_input`: W8A8, whose input is rounded at run time."""

    def __init__(self, weight: Float8Weight, rounds_input: bool) -> None:
        """weight: on its device already."""
        self._values, self._scale = weight
        self._rounds_input = rounds_input
        self.out_features = self._values.shape[0]
        self.name = "fp8" + (" block" if self._scale.ndim == 2 else "") + (" a8" if rounds_input else "")

    @classmethod
    def pack(cls, weight: Float8Weight, device: torch.device, rounds_input: bool) -> Float8:
        return cls(Float8Weight(weight.values.to(device), weight.scale.float().to(device)), rounds_input)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return float8_linear(x, self._values, self._scale, self._rounds_input, False)

    def matmul_in_pieces(self, x: torch.Tensor) -> torch.Tensor:
        """As `matmul`, or float32 [pieces, rows, out] whose sum that is."""
        return float8_linear(x, self._values, self._scale, self._rounds_input, False, True)

    def gated_matmul(self, x: torch.Tensor) -> torch.Tensor | None:
        """silu(gate) * up [rows, out / 2], with gate above up; None for blocks that hold a part of both."""
        if self._scale.ndim == 2 and self.out_features // 2 % FLOAT8_BLOCK:
            return None
        return float8_linear(x, self._values, self._scale, self._rounds_input, True)

    def rounded_dtype(self) -> torch.dtype | None:
        """float8_e4m3fn for W8A8 per channel on a GPU."""
        wants = self._rounds_input and self._scale.ndim == 1 and self._values.device.type != "cpu"
        return torch.float8_e4m3fn if wants else None

    def matmul_rounded(self, x: Rounded, keeps_pieces: bool = False) -> torch.Tensor:
        """x [rows, in], rounded already, times the transposed matrix."""
        return rounded_linear(x.values, x.scale, self._values, self._scale, x.dtype, keeps_pieces)

    def gated_rounded(self, x: Rounded, to: torch.dtype) -> Rounded:
        """x [rows, in], rounded already, times the transposed matrix, gated and rounded."""
        return Rounded(*rounded_gated_linear(x.values, x.scale, self._values, self._scale, x.dtype, to), x.dtype)

    def unpack(self) -> torch.Tensor:
        return dequantize_float8(self._values, self._scale)

    def step_bytes(self) -> int:
        return self._values.numel() + self._scale.numel() * 4

    def nbytes(self) -> int:
        return self.step_bytes()


class ScaledFloat8Input:
    """8-bit floats whose input is rounded to the one scale that the checkpoint has for it; larger inputs are cut."""

    def __init__(self, weight: Float8, input_scale: float) -> None:
        """weight: one that does not round its input itself."""
        self._weight, self._input_scale = weight, input_scale
        self.name, self.out_features = f"{weight.name} a8 static", weight.out_features

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        steps = (x.float() / self._input_scale).clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8)
        return self._weight.matmul((steps.to(torch.float8_e4m3fn).float() * self._input_scale).to(x.dtype))

    def unpack(self) -> torch.Tensor:
        return self._weight.unpack()

    def step_bytes(self) -> int:
        return self._weight.step_bytes()

    def nbytes(self) -> int:
        return self._weight.nbytes()


def concat_float8_weights(weights: Sequence[Float8Weight]) -> Float8Weight | None:
    """Stack matrices with the same inputs along their outputs; None where blocks would not stay whole."""
    if weights[0].scale.ndim == 2 and any(weight.values.shape[0] % FLOAT8_BLOCK for weight in weights[:-1]):
        return None
    return Float8Weight(torch.cat([w.values for w in weights]), torch.cat([w.scale for w in weights]))
