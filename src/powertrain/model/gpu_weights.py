"""Quantized integers as a GPU multiplies them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from powertrain.kernels.quantized import (
    Int4Blocks,
    dequantize_int4_blocks,
    int4_blocks_linear,
    pack_int4_blocks,
)

if TYPE_CHECKING:
    from powertrain.model.weights import IntWeight


class Int4Blocked:
    """4-bit integers with a scale (and a zero) for each group of inputs, in `Int4Blocks`."""

    name = "int4"

    def __init__(self, blocks: Int4Blocks) -> None:
        self._blocks = blocks
        self.out_features = blocks.values.shape[1]

    @classmethod
    def pack(cls, weight: IntWeight, device: torch.device) -> Int4Blocked | None:
        """None where no block size divides the groups."""
        in_features = weight.values.shape[1]
        group_size = in_features // weight.scale.shape[1]
        values = pack_int4_blocks((weight.values.to(device) + 8).view(torch.uint8), group_size)
        if values is None:
            return None
        zero = None if weight.zero_point is None else weight.zero_point.to(device).t().contiguous()
        return cls(Int4Blocks(values, weight.scale.to(device).t().contiguous(), zero))

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return int4_blocks_linear(x, self._blocks, False)

    def matmul_in_pieces(self, x: torch.Tensor) -> torch.Tensor:
        """As `matmul`, or float32 [pieces, rows, out] whose sum that is."""
        return int4_blocks_linear(x, self._blocks, False, True)

    def gated_matmul(self, x: torch.Tensor) -> torch.Tensor | None:
        """silu(gate) * up [rows, out / 2], with gate above up."""
        return int4_blocks_linear(x, self._blocks, True)

    def unpack(self) -> torch.Tensor:
        return dequantize_int4_blocks(self._blocks, torch.float32)

    def step_bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self._blocks if part is not None)

    def nbytes(self) -> int:
        return self.step_bytes()
