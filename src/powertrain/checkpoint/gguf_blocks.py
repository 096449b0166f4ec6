"""GGUF's weight types to float32. Each function takes blocks as uint8 [n, bytes] and gives float32 [n, weights].

Block layouts: ggml's `ggml-common.h`. In the types of 32 weights the low nibbles are weights 0-15 and the high ones
16-31. A K type is a super-block of 256 weights whose sub-blocks have integer scales under one float16 scale.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CHUNK_BLOCKS = 1 << 15
"""Blocks converted at a time: their temporaries then stay in the processor's cache instead of filling memory."""


def dequantize(type_name: str, rows: npt.NDArray[np.uint8]) -> Tensor:
    """Rows of blocks, uint8 [rows, bytes per row], as float32 [rows, weights per row]."""
    block_bytes, block_weights, convert = BLOCKS[type_name]
    blocks = torch.from_numpy(rows).reshape(-1, block_bytes)
    out = torch.empty(blocks.shape[0], block_weights, dtype=torch.float32)
    chunk = max(1, CHUNK_BLOCKS * 32 // block_weights)
    for start in range(0, blocks.shape[0], chunk):
        out[start : start + chunk] = convert(blocks[start : start + chunk])
    return out.view(rows.shape[0], -1)


def _half(blocks: Tensor, position: int) -> Tensor:
    """The float16 at byte `position` of each block, as float32 [n, 1]."""
    return blocks[:, position : position + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [n, k] -> uint8 [n, 2k]: all low halves, then all high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """uint8 [n, 4], one bit per weight, low first -> uint8 [n, 32] of 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (((packed.unsqueeze(-1) >> shifts) & 1) << 4).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (values.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks, 0) * values.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _sub_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and eight 6-bit minima in 12 bytes, each float32 [n, 8, 1].

    Bytes 0-3 and 4-7 hold the first four of each whole, and in their top two bits the top bits of the last four, whose
    low four bits are the nibbles of bytes 8-11.
    """
    first_scales, first_minima, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first_scales & 63, (rest & 15) | (first_scales >> 6 << 4)), dim=1)
    minima = torch.cat((first_minima & 63, (rest >> 4) | (first_minima >> 6 << 4)), dim=1)
    return scales.float().unsqueeze(-1), minima.float().unsqueeze(-1)


def _affine_sub_blocks(blocks: Tensor, values: Tensor) -> Tensor:
    """Q4_K and Q5_K: `values` uint8 [n, 8, 32] times their scales less their minima."""
    scales, minima = _sub_scales(blocks[:, 4:16])
    scale = _half(blocks, 0).unsqueeze(-1) * scales
    minimum = _half(blocks, 2).unsqueeze(-1) * minima
    return (scale * values.float() - minimum).flatten(1)


def _nibble_sub_blocks(packed: Tensor) -> Tensor:
    """uint8 [n, 128] -> [n, 8, 32]: each run of 32 bytes holds two sub-blocks, low halves first."""
    runs = packed.reshape(-1, 4, 1, 32)
    return torch.cat((runs & 15, runs >> 4), dim=2).flatten(1, 2)


def _q4_k(blocks: Tensor) -> Tensor:
    return _affine_sub_blocks(blocks, _nibble_sub_blocks(blocks[:, 16:]))


def _q5_k(blocks: Tensor) -> Tensor:
    # bit i of high byte j is the fifth bit of weight j of sub-block i
    shifts = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    high = ((blocks[:, 16:48].unsqueeze(1) >> shifts) & 1) << 4
    return _affine_sub_blocks(blocks, _nibble_sub_blocks(blocks[:, 48:]) | high)


def _q6_k(blocks: Tensor) -> Tensor:
    # each half of 128 weights: 64 bytes of low halves first, then high halves; 32 bytes of two bits for four runs of 32
    low = blocks[:, 0:128].reshape(-1, 2, 64)
    low = torch.cat((low & 15, low >> 4), dim=2)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).flatten(2)
    values = ((low | (high << 4)).float() - 32).reshape(-1, 16, 16)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (scales.unsqueeze(-1) * values).flatten(1)


def _pairs_of_bits(packed: Tensor) -> Tensor:
    """uint8 [n, 64], two halves of 32 bytes -> uint8 [n, 256] of 0 to 3: a byte holds one of four runs of 32."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    return ((packed.reshape(-1, 2, 1, 32) >> shifts) & 3).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    scales, minima = (blocks[:, :16] & 15).float(), (blocks[:, :16] >> 4).float()
    values = _pairs_of_bits(blocks[:, 16:80]).view(-1, 16, 16).float()
    scale = (_half(blocks, 80) * scales).unsqueeze(-1)
    return (scale * values - (_half(blocks, 82) * minima).unsqueeze(-1)).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    # bit i of the first 32 bytes is the third bit of the weights of run i of 32; values are stored plus 4
    shifts = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    high = (((blocks[:, 0:32].unsqueeze(1) >> shifts) & 1) << 2).flatten(1)
    values = (_pairs_of_bits(blocks[:, 32:96]) | high).view(-1, 16, 16).float() - 4
    low = _nibbles(blocks[:, 96:104])
    top = ((blocks[:, 104:108].unsqueeze(1) >> torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 4, 1)) & 3).flatten(1)
    scales = (low | (top << 4)).float() - 32
    return ((_half(blocks, 108) * scales).unsqueeze(-1) * values).flatten(1)


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.contiguous().view(dtype).float()


BLOCKS: dict[str, tuple[int, int, Callable[[Tensor], Tensor]]] = {
    "F32": (4, 1, _as(torch.float32)),
    "F16": (2, 1, _as(torch.float16)),
    "BF16": (2, 1, _as(torch.bfloat16)),
    "Q4_0": (18, 32, _q4_0),
    "Q4_1": (20, 32, _q4_1),
    "Q5_0": (22, 32, _q5_0),
    "Q5_1": (24, 32, _q5_1),
    "Q8_0": (34, 32, _q8_0),
    "Q2_K": (84, 256, _q2_k),
    "Q3_K": (110, 256, _q3_k),
    "Q4_K": (144, 256, _q4_k),
    "Q5_K": (176, 256, _q5_k),
    "Q6_K": (210, 256, _q6_k),
}
"""Type name -> (bytes per block, weights per block, conversion)."""
