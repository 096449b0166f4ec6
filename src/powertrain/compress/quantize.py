"""Rounding a matrix onto an integer grid: pure functions, (weight, scheme) -> (integers, error)."""

from __future__ import annotations

import torch

from powertrain.compress.ranges import SHRINK_STEPS, Observer, choose_range, to_integers
from powertrain.model.weights import IntWeight
from powertrain.types import PowertrainError, QuantScheme

GROUP_SIZE_STEP = 32
"""Group sizes are multiples of this: what the engine's kernels (and everyone else's) can run."""


FAST_GROUP_SIZES = (32, 64, 128, 256)
"""What torch's 4-bit product on CPUs, and the 4-bit GPU kernels of other engines, are written for."""


def dividing_group_sizes(in_features: int) -> list[int]:
    """The group sizes a row of `in_features` can have: multiples of 32 that divide it and leave at least two groups."""
    return [size for size in range(GROUP_SIZE_STEP, in_features // 2 + 1, GROUP_SIZE_STEP) if in_features % size == 0]


def check_group_size(name: str, in_features: int, group_size: int | None) -> None:
    """Refuse a group size that does not divide a row: a short last group is refused or misread by other readers.

    Raises `PowertrainError` naming the layer and the sizes that do.
    """
    if group_size is None or group_size == in_features:
        return
    if group_size % GROUP_SIZE_STEP or group_size < GROUP_SIZE_STEP:
        raise PowertrainError(
            f"{name}: group_size {group_size} is not a multiple of {GROUP_SIZE_STEP}; {_sizes_that_do(in_features)}"
        )
    if in_features % group_size:
        raise PowertrainError(
            f"{name}: group_size {group_size} does not divide {in_features}; {_sizes_that_do(in_features)}"
        )


def _sizes_that_do(in_features: int) -> str:
    sizes = ", ".join(str(size) for size in dividing_group_sizes(in_features)) or "none"
    return f"sizes that do: {sizes} (or `channel`)"


def nearest_group_size(in_features: int, group_size: int) -> int | None:
    """The dividing size closest to `group_size` by ratio (the smaller on a tie), or None (channel) if none divides.

    Sizes that fast kernels know go first: 576 takes 64 for 128, although 96 is closer.
    """
    dividing = dividing_group_sizes(in_features)
    sizes = [size for size in dividing if size in FAST_GROUP_SIZES] or dividing
    if not sizes:
        return None
    return min(sizes, key=lambda size: (max(size, group_size) / min(size, group_size), size))


def rtn(
    weight: torch.Tensor,
    scheme: QuantScheme,
    *,
    scale_dtype: torch.dtype = torch.float32,
    observer: Observer = "minmax",
    name: str = "weight",
    shrink_steps: int = SHRINK_STEPS,
) -> tuple[IntWeight, float]:
    """Round a matrix to the nearest points of a grid per group (compressed-tensors' conventions).

    `weight` is float [out, in]. Symmetric: scale = absmax / ((2^b - 1) / 2), so 7.5 steps for 4 bits. Asymmetric: the
    range, widened to hold zero, in 2^b - 1 steps with an integer zero point. `observer` "mse" searches for a smaller
    range with less error, in `shrink_steps` trials (`compress/ranges.py`). The scale is rounded to `scale_dtype` before
    the integers are chosen, so that what is stored is what was rounded to; a group of zeros stays exactly zero.

    Returns the integers and the normalised squared weight error, ||w - w'||^2 / ||w||^2.
    Raises `PowertrainError` naming `name` if the weight is not a matrix, holds NaN or infinity, has rows the groups do
    not divide, or needs a scale beyond `scale_dtype`.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise PowertrainError(f"{name}: only a float matrix can be quantized, got {weight.dtype} {list(weight.shape)}")
    out_features, in_features = weight.shape
    check_group_size(name, in_features, scheme.group_size)
    weight = weight.to(torch.float32)
    groups = weight.view(out_features, -1, scheme.group_size or in_features)
    scale, zero_point = choose_range(
        groups, scheme.num_bits, scheme.symmetric, observer, scale_dtype, name, shrink_steps
    )
    values = to_integers(groups, scale, zero_point, scheme.num_bits)
    quantized = IntWeight(
        values=values.to(torch.int8).view(out_features, in_features),
        scale=scale.to(scale_dtype),
        zero_point=None if zero_point is None else zero_point.to(torch.int8),
        num_bits=scheme.num_bits,
    )
    return quantized, weight_error(weight, quantized.dequantize())


def weight_error(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    """Normalised squared error ||w - w'||^2 / ||w||^2 of two matrices of one shape; 0 for all zeros."""
    energy = weight.float().square().sum(dtype=torch.float64)
    error = (weight.float() - approximation.float()).square().sum(dtype=torch.float64)
    return float(error / energy) if energy > 0 else float(error)
