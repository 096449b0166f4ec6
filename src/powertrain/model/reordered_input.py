"""Products whose input is put in another order first, as GPTQ's activation order asks for."""

from __future__ import annotations

import torch

from powertrain.model.weights import WeightFormat


class ReorderedInput:
    """A weight format whose column i multiplies input `order[i]`: columns of one group lie together in memory."""

    def __init__(self, weight: WeightFormat, order: torch.Tensor) -> None:
        """order: int64 [in], on the weight's device."""
        self.weight, self._order = weight, order
        self.name, self.out_features = f"{weight.name} act-order", weight.out_features

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.matmul(x.index_select(1, self._order))

    def unpack(self) -> torch.Tensor:
        return self.weight.unpack()[:, self._order.argsort()]

    def step_bytes(self) -> int:
        return self.weight.step_bytes() + self._order.nbytes

    def nbytes(self) -> int:
        return self.weight.nbytes() + self._order.nbytes
