"""4-bit floats: NVFP4 (groups of 16, scales of 8 bits) and MXFP4 (groups of 32, scales that are powers of two)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from powertrain.kernels.float4 import power_of_two, unpack_float4
from powertrain.model.weights import Dense, IntWeight


class Float4Weight(NamedTuple):
    """A matrix of 4-bit floats: `weight = values * scale / global_scale`, a scale for each group of inputs.

    packed: uint8 [out, in / 2], two codes to a byte (`kernels/float4.py`).
    NVFP4: scale float8_e4m3fn [out, in / 16], global_scale float32 [1], or [out] once matrices are stacked.
    MXFP4: scale uint8 [out, in / 32], exponents of two biased by 127; global_scale None.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None

    @property
    def kind(self) -> str:
        return "mxfp4" if self.global_scale is None else "nvfp4"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in], computed in float32 and rounded once."""
        if self.global_scale is None:
            scale = power_of_two(self.scale)
        else:
            scale = self.scale.float() / self.global_scale.unsqueeze(1)
        groups = unpack_float4(self.packed).view(*scale.shape, -1)
        return (groups * scale.unsqueeze(-1)).flatten(1).to(dtype)

    def as_integers(self) -> IntWeight | None:
        """MXFP4 as integers of 8 bits that mean the same numbers: twice its sizes are whole. None for NVFP4.

        NVFP4 has groups of 16, which the kernels for integers do not run.
        """
        if self.global_scale is not None:
            return None
        values = (unpack_float4(self.packed) * 2).to(torch.int8)
        return IntWeight(values, power_of_two(self.scale) / 2, None, 8)

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self if part is not None)


class Float4:
    """4-bit floats with a scale for each group, their input as it is: W4A16.

    On a GPU the bytes are kept and widened for each product. On a CPU, where that takes longer than the product, they
    are widened once: what is held and read is then the dense matrix, and the name says so.
    """

    def __init__(self, weight: Float4Weight) -> None:
        """weight: on its device already."""
        self._weight: Float4Weight | None = weight
        self._dense: Dense | None = None
        self.out_features = weight.packed.shape[0]
        self.name = weight.kind

    @classmethod
    def pack(cls, weight: Float4Weight, device: torch.device, dtype: torch.dtype) -> Float4:
        """dtype: of the inputs to come."""
        divisor = None if weight.global_scale is None else weight.global_scale.to(device)
        made = cls(Float4Weight(weight.packed.to(device), weight.scale.to(device), divisor))
        if device.type == "cpu":
            made._weight, made._dense = None, Dense(weight.dequantize(dtype))
            made.name = f"{weight.kind} as {made._dense.name}"
        return made

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        if self._dense is not None:
            return self._dense.matmul(x)
        assert self._weight is not None
        return x @ self._weight.dequantize(x.dtype).t()

    def unpack(self) -> torch.Tensor:
        if self._dense is not None:
            return self._dense.unpack()
        assert self._weight is not None
        return self._weight.dequantize()

    def step_bytes(self) -> int:
        """Of the weight as it is held; a GPU also writes and reads the widened matrix."""
        return self.nbytes()

    def nbytes(self) -> int:
        if self._dense is not None:
            return self._dense.nbytes()
        assert self._weight is not None
        return self._weight.nbytes()


def concat_float4_weights(weights: Sequence[Float4Weight]) -> Float4Weight:
    """Stack matrices of one kind with the same inputs along their outputs; each output keeps its own divisor."""
    if len(weights) == 1:
        return weights[0]
    divisors = [w.global_scale.expand(len(w.packed)) for w in weights if w.global_scale is not None]
    return Float4Weight(
        torch.cat([w.packed for w in weights]),
        torch.cat([w.scale for w in weights]),
        torch.cat(divisors) if divisors else None,
    )
