"""Products with 8-bit floats, and how a product's input is rounded to 8 bits first where W8A8 asks for it."""

from __future__ import annotations

import torch

from powertrain.kernels.op import Op

FLOAT8_BLOCK = 128
"""Outputs and inputs that share a scale in a matrix of blocks, and inputs of one row in its activations."""

LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max


def dequantize_float8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in] of values float8_e4m3fn [out, in] and scale [out] or [out / 128, in / 128], rounded up."""
    if scale.ndim == 1:
        return values.float() * scale.float().unsqueeze(1)
    rows, columns = values.shape
    spread = scale.float().repeat_interleave(FLOAT8_BLOCK, 0)[:rows].repeat_interleave(FLOAT8_BLOCK, 1)[:, :columns]
    return values.float() * spread


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


def _float8_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, rounds_input: bool) -> torch.Tensor:
    """x [rows, in] times the transposed matrix of 8-bit floats (see `dequantize_float8`); returns x's dtype.

    `rounds_input`: each row of x, or each 128 of its inputs for a matrix of blocks, is rounded to 8-bit floats first.
    """
    weight = dequantize_float8(values, scale)
    if not rounds_input:
        return x @ weight.to(x.dtype).t()
    group = FLOAT8_BLOCK if scale.ndim == 2 else None
    narrow, own = quantize_to_float8(x, group)
    spread = own.repeat_interleave(group or x.shape[1], 1)[:, : x.shape[1]]
    return ((narrow.float() * spread) @ weight.t()).to(x.dtype)


float8_linear = Op("float8_linear", _float8_linear)
