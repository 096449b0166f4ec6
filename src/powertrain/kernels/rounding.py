"""Activations rounded to 8 bits, row by row, and the ops that hand them on rounded, so that they are read once less."""

from __future__ import annotations

from typing import NamedTuple

import torch

from powertrain.kernels.fused import add_rms_norm, silu_mul
from powertrain.kernels.gpu_provider import refuse_gaps, triton_provider
from powertrain.kernels.op import Op

LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max

INT8_STEPS = 127.5
"""compressed-tensors' dynamic symmetric grid of 8 bits: scale = absmax / 127.5, integers clamped to [-128, 127]."""


class Rounded(NamedTuple):
    """Activations on a grid of 8 bits for each row.

    values: int8 or float8_e4m3fn [rows, n]; scale: float32 [rows]; dtype: of what they stand for and of products.
    """

    values: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype


def quantize_to_float8(x: torch.Tensor, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, n] as float8_e4m3fn [rows, n] and float32 scales [rows, groups]: absmax / 448 of each group of a row.

    `group_size` None takes a row as one group; a last group may be short. A group of zeros has scale 1.
    """
    rows, size = x.shape
    group = group_size or size
    padded = torch.nn.functional.pad(x.float(), (0, -size % group)).view(rows, -1, group)
    scale = padded.abs().amax(-1, keepdim=True) / LARGEST_FLOAT8
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = (padded / scale).clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn)
    return values.view(rows, -1)[:, :size].contiguous(), scale.squeeze(-1)


def quantize_to_int8(x: torch.Tensor, group_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, n] as int8 [rows, n] and float32 scales [rows, groups], on the grid of `INT8_STEPS`."""
    rows, size = x.shape
    groups = x.float().view(rows, -1, group_size or size)
    scale = groups.abs().amax(dim=-1, keepdim=True) / INT8_STEPS
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = torch.round(groups / scale).clamp_(-128, 127).to(torch.int8)
    return values.view(rows, size), scale.squeeze(-1)


def _round(x: torch.Tensor, to: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = quantize_to_int8(x) if to == torch.int8 else quantize_to_float8(x)
    return values, scale[:, 0]


def _add_rms_norm_rounded(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, to: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` of x [rows, d], rounded: values in `to` [rows, d] and float32 scale [rows]."""
    return _round(add_rms_norm.reference(x, delta, weight, eps), to)


def _silu_mul_rounded(gate_up: torch.Tensor, to: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul` of gate_up [rows, 2 f], rounded: values in `to` [rows, f] and float32 scale [rows]."""
    return _round(silu_mul.reference(gate_up), to)


add_rms_norm_rounded = Op(
    "add_rms_norm_rounded", _add_rms_norm_rounded, (triton_provider("fused", "add_rms_norm_rounded", refuse_gaps),)
)
silu_mul_rounded = Op(
    "silu_mul_rounded", _silu_mul_rounded, (triton_provider("fused", "silu_mul_rounded", refuse_gaps),)
)
