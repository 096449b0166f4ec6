"""4-bit floats (e2m1): the eight sizes 0 to 6 and a sign, and the scales that 16 or 32 of them share.

The sizes are Open Compute's (Rouhani et al. 2023, arXiv 2310.10537). NVFP4 gives 16 of them a float8_e4m3fn scale and a
matrix one float32 divisor; MXFP4 gives 32 of them a power of two.
"""

from __future__ import annotations

from functools import cache

import torch

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the low three bits of a code stand for; the fourth is the sign."""

LARGEST_FLOAT4 = SIZES[-1]
NVFP4_GROUP, MXFP4_GROUP = 16, 32

EXPONENT_BIAS = 127
LARGEST_EXPONENT = 254
"""Of e8m0, biased: 255 is its NaN."""


def round_to_float4(x: torch.Tensor) -> torch.Tensor:
    """x, any shape, at the nearest of `SIZES` with its sign, in its dtype; ties go to the even code, 6 is the most."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    # round() takes halves to even, and the even multiples of a step are the even codes
    return torch.copysign((torch.round(size / step) * step).clamp_(max=LARGEST_FLOAT4), x)


def float4_codes(x: torch.Tensor) -> torch.Tensor:
    """x, any shape, as codes uint8 of the nearest sizes; the sign of what rounds to zero is kept.

    So the compressed-tensors library writes them, bit for bit, but a zero that was negative before is positive.
    """
    size = round_to_float4(x).abs()
    # codes go up by one for each step: halves below 2, ones below 4, then twos
    codes = torch.minimum(torch.minimum(size * 2, size + 2), size / 2 + 4).to(torch.uint8)
    return codes | (x < 0).to(torch.uint8) << 3


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [rows, n], n even, two to a byte: uint8 [rows, n / 2], the first in the low bits."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """float32 [256, 2]: what the two codes of a byte stand for. Kept, since a CUDA graph cannot copy from the host."""
    values = torch.tensor(SIZES + tuple(-size for size in SIZES))
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=-1).to(device)


def unpack_float4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, n / 2] -> float32 [rows, n], before any scale."""
    return torch.nn.functional.embedding(packed.to(torch.int32), _pairs(packed.device)).flatten(1)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """uint8 biased by 127 (e8m0) -> float32 of the same shape, exact; 255, which means NaN, is not looked for."""
    # a float32 is made of these bits; 2^-127, below its smallest normal number, is half of 2^-126
    bits = torch.where(exponent == 0, 1 << 22, exponent.to(torch.int32) << 23)
    return bits.to(torch.int32).view(torch.float32)


def power_of_two_for(absmax: torch.Tensor) -> torch.Tensor:
    """uint8 exponents biased by 127 for groups of these largest sizes (float32): the largest is brought to [3.5, 7).

    This is compressed-tensors' rule. Above 7 the largest would lose more by being cut to 6 than the others gain.
    """
    mantissa, exponent = torch.frexp(absmax.float())  # absmax = mantissa * 2^exponent, mantissa in [0.5, 1)
    power = exponent - 3 + (mantissa >= 0.875).to(exponent.dtype)
    return torch.where(absmax == 0, 0, power + EXPONENT_BIAS).clamp_(0, LARGEST_EXPONENT).to(torch.uint8)
