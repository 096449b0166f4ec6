"""Float matrices to GGUF's weight types: the inverse of `gguf_blocks`. Each encoder takes float32 [n, weights].

The types of 32 weights are rounded as ggml rounds them, bit for bit; the K types are fitted (`gguf_encode_k`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from powertrain.checkpoint.gguf_blocks import BLOCKS
from powertrain.checkpoint.gguf_encode_k import K_ENCODERS
from powertrain.types import PowertrainError

CHUNK_WEIGHTS = 1 << 18
"""Weights converted at a time: the temporaries of a fit are some twenty times that, and stay near the processor."""

LARGEST_HALF = 65504.0
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def encode(type_name: str, weight: Tensor) -> npt.NDArray[np.uint8]:
    """A float matrix [rows, columns] as rows of blocks, uint8 [rows, bytes per row].

    Raises `PowertrainError` for columns that blocks do not divide, and for numbers that are not finite or beyond the
    range of float16, which scales have.
    """
    block_bytes, block_weights, _ = BLOCKS[type_name]
    if weight.shape[-1] % block_weights:
        raise PowertrainError(
            f"rows of {weight.shape[-1]} are no whole blocks of {type_name} ({block_weights} weights)"
        )
    blocks = weight.detach().reshape(-1, block_weights)
    out = torch.empty(blocks.shape[0], block_bytes, dtype=torch.uint8)
    chunk = max(1, CHUNK_WEIGHTS // block_weights)
    for start in range(0, blocks.shape[0], chunk):
        part = blocks[start : start + chunk].float()
        if not bool(torch.isfinite(part).all()):
            raise PowertrainError("holds NaN or infinity")
        if type_name not in ("F32", "BF16") and float(part.abs().amax()) > LARGEST_HALF:
            raise PowertrainError(f"holds a number beyond float16, which {type_name} needs: bf16 or f32 hold it")
        out[start : start + chunk] = ENCODERS[type_name](part).cpu()
    return out.view(weight.shape[0], -1).numpy()


def half_bytes(values: Tensor) -> Tensor:
    """Numbers [n, 1] as float16: uint8 [n, 2]."""
    return values.to(torch.float16).contiguous().view(torch.uint8)


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [n, 32] of 0 to 15 -> uint8 [n, 16]: the first half of a block in the low bits, the second in the high."""
    low, high = values.chunk(2, dim=1)
    return low | (high << 4)


def pack_fifth_bits(values: Tensor) -> Tensor:
    """uint8 [n, 32] of 0 to 31 -> uint8 [n, 4]: bit 4 of each, low first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=values.device)
    return ((values >> 4).view(-1, 4, 8) << shifts).sum(-1, dtype=torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale whose inverse is infinite."""
    return torch.where(scale.abs() < SMALLEST_NORMAL, torch.zeros_like(scale), 1 / scale)


def _symmetric(blocks: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """(scale [n, 1], values + half the levels, uint8 [n, 32]): the number of largest size, the first of equals, lies on
    the lowest level."""
    size = blocks.abs()
    positions = torch.arange(blocks.shape[1], device=blocks.device).expand_as(blocks)
    first = torch.where(size == size.amax(1, keepdim=True), positions, blocks.shape[1]).amin(1, keepdim=True)
    half = num_levels // 2
    scale = blocks.gather(1, first) / -half
    values = (blocks * _inverse(scale) + (half + 0.5)).trunc()
    return scale, values.clamp(0, num_levels - 1).to(torch.uint8)


def _affine(blocks: Tensor, num_levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale [n, 1], minimum [n, 1], values uint8 [n, 32])."""
    minimum = blocks.amin(1, keepdim=True)
    scale = (blocks.amax(1, keepdim=True) - minimum) / (num_levels - 1)
    values = ((blocks - minimum) * _inverse(scale) + 0.5).trunc()
    return scale, minimum, values.clamp(0, num_levels - 1).to(torch.uint8)


def _q4_0(blocks: Tensor) -> Tensor:
    scale, values = _symmetric(blocks, 16)
    return torch.cat((half_bytes(scale), pack_nibbles(values)), dim=1)


def _q4_1(blocks: Tensor) -> Tensor:
    scale, minimum, values = _affine(blocks, 16)
    return torch.cat((half_bytes(scale), half_bytes(minimum), pack_nibbles(values)), dim=1)


def _q5_0(blocks: Tensor) -> Tensor:
    scale, values = _symmetric(blocks, 32)
    return torch.cat((half_bytes(scale), pack_fifth_bits(values), pack_nibbles(values & 15)), dim=1)


def _q5_1(blocks: Tensor) -> Tensor:
    scale, minimum, values = _affine(blocks, 32)
    halves = (half_bytes(scale), half_bytes(minimum))
    return torch.cat((*halves, pack_fifth_bits(values), pack_nibbles(values & 15)), dim=1)


def _q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    size = scaled.abs()
    whole = size.floor()
    values = scaled.sign() * (whole + (2 * (size - whole)).floor())  # halves away from zero
    return torch.cat((half_bytes(scale), values.to(torch.int8).view(torch.uint8)), dim=1)


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.to(dtype).contiguous().view(torch.uint8)


ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _as(torch.float32),
    "F16": _as(torch.float16),
    "BF16": _as(torch.bfloat16),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    **K_ENCODERS,
}
