"""Weight formats: how a Linear's matrix is stored and multiplied. One small class per dtype and packing."""

from __future__ import annotations

from typing import NamedTuple

import torch


class IntWeight(NamedTuple):
    """An integer-quantized matrix before packing: `weight = (values - zero_point) * scale` per group of inputs.

    values: int8 [out, in], each in [-2^(b-1), 2^(b-1) - 1]; scale: float [out, groups];
    zero_point: int8 [out, groups] on the same range, or None when symmetric. groups = in / group_size, 1 per channel.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    num_bits: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] these integers stand for, computed in float32 and rounded once to `dtype`."""
        out_features, in_features = self.values.shape
        groups = self.scale.shape[1]
        values = self.values.to(torch.float32).view(out_features, groups, in_features // groups)
        if self.zero_point is not None:
            values = values - self.zero_point.to(torch.float32).unsqueeze(-1)
        return (values * self.scale.to(torch.float32).unsqueeze(-1)).view(out_features, in_features).to(dtype)
