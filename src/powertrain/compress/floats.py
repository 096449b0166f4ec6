"""Rounding a matrix to floats of 8 or 4 bits: pure functions, (weight) -> (its codes and scales, error)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from powertrain.checkpoint.float8 import Strategy
from powertrain.checkpoint.float_presets import FloatScheme
from powertrain.compress.quantize import weight_error
from powertrain.kernels.float4 import (
    LARGEST_FLOAT4,
    MXFP4_GROUP,
    NVFP4_GROUP,
    float4_codes,
    pack_codes,
    power_of_two,
    power_of_two_for,
    round_to_float4,
)
from powertrain.kernels.quantized import FLOAT8_BLOCK
from powertrain.kernels.rounding import LARGEST_FLOAT8, quantize_to_float8
from powertrain.model.float4 import Float4Weight
from powertrain.model.float8 import Float8Weight
from powertrain.types import PowertrainError

NVFP4_TARGETS = (LARGEST_FLOAT4, 4.0)
"""What the largest of a group may become. 4 leaves no gap between 4 and 6 for the others to fall into."""

SMALLEST_CODE, LARGEST_CODE = 0x01, 0x7E
"""The bytes of float8_e4m3fn's positive numbers: they count up as the numbers do, 2^-9 to 448."""

WEIGHTS_AT_ONCE = 1 << 20
"""Weights whose scales are sought together, so that a search needs some buffers of 4 MB whatever the matrix."""

Candidates = Callable[[torch.Tensor], Iterator[torch.Tensor]]
"""Largest sizes float32 [rows, groups] -> the scales to try for them, as they are stored, the usual ones first."""


def to_float8(
    weight: torch.Tensor, strategy: Strategy = "channel", *, absmax: float | None = None, name: str = "weight"
) -> tuple[Float8Weight, float]:
    """Round a float matrix [out, in] to float8_e4m3fn with scales of absmax / 448, float32.

    `strategy`: which weights share a scale: "channel" an output, "block" 128 by 128 (short at the ends), "tensor" all
    of them, whose scale is then repeated for each output. Zeros have scale 1. `absmax`, for "tensor" alone, takes the
    place of the matrix's own largest size, which it must not be below: other engines multiply by some matrices as one
    (q, k and v; gate and up), and round anew those whose scale is not the largest.

    Returns the matrix and the normalised squared weight error, ||w - w'||^2 / ||w||^2.
    Raises `PowertrainError` naming `name` if the weight is no float matrix, holds NaN or infinity, or is beyond
    `absmax`.
    Source: Micikevicius et al. 2022, arXiv 2209.05433; blocks as in DeepSeek-V3, arXiv 2412.19437.
    """
    wide = _checked(weight, name)
    rows, columns = wide.shape
    if strategy == "channel":
        values, scale = quantize_to_float8(wide)
        rounded = Float8Weight(values, scale[:, 0])
    elif strategy == "tensor":
        scale = torch.full((1,), _largest(wide, absmax, name) or LARGEST_FLOAT8, device=wide.device) / LARGEST_FLOAT8
        values = (wide / scale).clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn)
        rounded = Float8Weight(values, scale.expand(rows).contiguous())
    elif strategy == "block":
        size = FLOAT8_BLOCK
        padded = torch.nn.functional.pad(wide, (0, -columns % size, 0, -rows % size))
        blocks = padded.view(-(-rows // size), size, -1, size).transpose(1, 2)
        values, scale = quantize_to_float8(blocks.flatten(2).flatten(0, 1))
        whole = values.view(blocks.shape).transpose(1, 2).reshape(padded.shape)
        rounded = Float8Weight(whole[:rows, :columns].contiguous(), scale.view(blocks.shape[:2]))
    else:
        raise PowertrainError(f"{name}: strategy {strategy!r} is unknown; tensor, channel and block are known")
    return rounded, weight_error(wide, rounded.dequantize())


def to_preset(
    weight: torch.Tensor, scheme: FloatScheme, *, search: bool, absmax: float | None = None, name: str = "weight"
) -> tuple[Float8Weight | Float4Weight, float]:
    """Round a float matrix [out, in] as a preset says; `search` is for 4 bits, `absmax` for FP8 and NVFP4.

    Returns and raises what the function of the format does.
    """
    if scheme.preset == "NVFP4A16":
        return to_nvfp4(weight, search, absmax=absmax, name=name)
    if scheme.preset == "MXFP4A16":
        return to_mxfp4(weight, search, name=name)
    assert scheme.strategy is not None
    return to_float8(weight, scheme.strategy, absmax=absmax if scheme.strategy == "tensor" else None, name=name)


def to_nvfp4(
    weight: torch.Tensor, search: bool, *, absmax: float | None = None, name: str = "weight"
) -> tuple[Float4Weight, float]:
    """Round a float matrix [out, in] to NVFP4: 4-bit floats, float8 scales of 16 inputs, one float32 divisor.

    The divisor is 448 * 6 / absmax, so that the largest scale is float8's largest. `absmax` takes the place of the
    matrix's own largest size, which it must not be below: matrices that other engines multiply as one (q, k and v; gate
    and up) need the same divisor there. `search` tries for each group the scales that take its largest weight to 6 and
    to 4 ("four over six", Cook et al. 2025, arXiv 2512.02010) and the next float8 numbers either side of both, and
    keeps the least squared error. Without it the result is the compressed-tensors library's, but for groups that are
    nothing beside the largest: their scale is float8's smallest, where the library's loses them.

    Returns the matrix and the normalised squared weight error, ||w - w'||^2 / ||w||^2.
    Raises `PowertrainError` naming `name` if the weight is no float matrix, holds NaN or infinity, has rows that groups
    of 16 do not divide, or is beyond `absmax`.
    """
    wide = _checked(weight, name, NVFP4_GROUP)
    largest = _largest(wide, absmax, name)
    divisor = torch.full((1,), largest or LARGEST_FLOAT8 * LARGEST_FLOAT4, device=wide.device)
    divisor = LARGEST_FLOAT8 * LARGEST_FLOAT4 / divisor
    divisor.clamp_(max=torch.finfo(torch.float32).max)

    def candidates(groups_absmax: torch.Tensor) -> Iterator[torch.Tensor]:
        for target in NVFP4_TARGETS if search else NVFP4_TARGETS[:1]:
            wanted = (divisor * (groups_absmax / target)).clamp_(max=LARGEST_FLOAT8)
            code = wanted.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
            for step in (0, -1, 1) if search else (0,):
                # a scale of 0 would lose a group that is small beside the others
                yield (code + step).clamp_(SMALLEST_CODE, LARGEST_CODE).to(torch.uint8).view(torch.float8_e4m3fn)

    return _to_float4(wide, NVFP4_GROUP, candidates, divisor)


def to_mxfp4(weight: torch.Tensor, search: bool, *, name: str = "weight") -> tuple[Float4Weight, float]:
    """Round a float matrix [out, in] to MXFP4: 4-bit floats, a power of two for every 32 inputs.

    The power takes a group's largest weight to [3.5, 7), as the compressed-tensors library has it. `search` tries the
    next smaller one too, which cuts the largest to 6 and has finer steps, and keeps the least squared error. The next
    larger one cannot be better: below 7 its sizes are all sizes of this one, or further away.

    Returns the matrix and the normalised squared weight error, ||w - w'||^2 / ||w||^2.
    Raises `PowertrainError` naming `name` if the weight is no float matrix, holds NaN or infinity, or has rows that
    groups of 32 do not divide. Source: Rouhani et al. 2023, arXiv 2310.10537.
    """
    wide = _checked(weight, name, MXFP4_GROUP)

    def candidates(groups_absmax: torch.Tensor) -> Iterator[torch.Tensor]:
        exponent = power_of_two_for(groups_absmax)
        yield exponent
        if search:
            yield exponent - (exponent > 0).to(torch.uint8)

    return _to_float4(wide, MXFP4_GROUP, candidates, None)


def static_input_scale(sizes: torch.Tensor, name: str) -> float:
    """The one scale of a layer's inputs, of `sizes` [in], the largest of each on calibration text; 1 for zeros.

    It takes the largest to 448; what is larger yet at run time is cut. The steps of floats shrink with their numbers,
    so a wide range costs small inputs nothing until they are 2^14 times smaller than the largest, and no narrower one
    is sought. Raises `PowertrainError` naming `name` for NaN or infinity.
    """
    largest = sizes.float().amax()
    if not bool(torch.isfinite(largest)):
        raise PowertrainError(f"{name}: its inputs hold NaN or infinity on the calibration text")
    return float(largest / LARGEST_FLOAT8) or 1.0


def _largest(wide: torch.Tensor, absmax: float | None, name: str) -> float:
    """`absmax`, or the matrix's own largest size, which must not be above it."""
    own = float(wide.abs().amax()) if wide.numel() else 0.0
    largest = own if absmax is None else absmax
    if not own <= largest < float("inf"):
        raise PowertrainError(f"{name}: absmax {absmax} is below its largest weight, {own}")
    return largest


def _checked(weight: torch.Tensor, name: str, group_size: int = 1) -> torch.Tensor:
    """The matrix in float32; `PowertrainError` for what cannot be rounded."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise PowertrainError(f"{name}: only a float matrix can be quantized, got {weight.dtype} {list(weight.shape)}")
    if weight.shape[1] % group_size:
        raise PowertrainError(f"{name}: groups of {group_size} do not divide its rows of {weight.shape[1]}")
    if not bool(torch.isfinite(weight).all()):
        raise PowertrainError(f"{name}: holds NaN or infinity, so no scale fits it; the source file is damaged")
    return weight.float()


def _to_float4(
    weight: torch.Tensor, group_size: int, candidates: Candidates, divisor: torch.Tensor | None
) -> tuple[Float4Weight, float]:
    packed, scales = [], []
    for rows in torch.split(weight, max(1, WEIGHTS_AT_ONCE // weight.shape[1])):
        groups = rows.reshape(len(rows), -1, group_size)
        scale = _best_scale(groups, candidates(groups.abs().amax(-1)), divisor)
        steps = groups / _meaning(scale, divisor).unsqueeze(-1)
        packed.append(pack_codes(float4_codes(steps).flatten(1)))
        scales.append(scale)
    rounded = Float4Weight(torch.cat(packed), torch.cat(scales), divisor)
    return rounded, weight_error(weight, rounded.dequantize())


def _meaning(scale: torch.Tensor, divisor: torch.Tensor | None) -> torch.Tensor:
    return power_of_two(scale) if divisor is None else scale.float() / divisor


def _best_scale(groups: torch.Tensor, candidates: Iterator[torch.Tensor], divisor: torch.Tensor | None) -> torch.Tensor:
    """The stored scales [rows, groups] with the least squared error each; the first of equals."""
    best = next(candidates)
    first = _meaning(best, divisor)
    least = _squared_error(groups, first, first)
    for scale in candidates:
        error = _squared_error(groups, _meaning(scale, divisor), first)
        is_better = error < least
        least = torch.where(is_better, error, least)
        # bytes, since not every op knows float8
        chosen = torch.where(is_better, scale.view(torch.uint8), best.view(torch.uint8))
        best = chosen.view(best.dtype)
    return best


def _squared_error(groups: torch.Tensor, scale: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """[rows, groups], in squares of `unit`: of the weights themselves they would overflow or vanish."""
    steps = groups / scale.unsqueeze(-1)
    return (round_to_float4(steps) - steps).square_().sum(-1) * (scale / unit).square()
