"""GPTQ onto grids of floats: a textbook version in float64, and outputs nearer than those of rounding to nearest."""

from __future__ import annotations

import pytest
import torch

from powertrain.checkpoint.float_presets import FloatScheme
from powertrain.compress.floats import to_preset
from powertrain.compress.gptq import Moments
from powertrain.compress.gptq_floats import gptq_floats
from powertrain.kernels.float4 import SIZES
from powertrain.types import PowertrainError

PRESETS = ("FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")


def inputs(num: int, width: int) -> torch.Tensor:
    """Correlated, with a few large directions, as activations are."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return torch.randn(num, width, generator=generator) @ mix


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments.zeros(x.shape[1], x.device)
    moments.add(x)
    return moments


def weight_of(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("preset", PRESETS)
def test_outputs_are_nearer_than_those_of_rounding_to_nearest(preset: str) -> None:
    weight, x, scheme = weight_of(150, 192), inputs(1500, 192), FloatScheme(preset)
    found, error = gptq_floats(weight, scheme, moments_of(x[:1000]))
    plain, least = to_preset(weight, scheme, search=True)
    seen = x[1000:]
    errors = [float((seen @ (one.dequantize() - weight).t()).square().sum()) for one in (found, plain)]
    assert errors[0] < 0.7 * errors[1]
    assert error > least  # it is the outputs that are nearer
    for own, other in zip(found[1:], plain[1:], strict=True):  # all but the codes
        assert own is None or torch.equal(own.float(), other.float())


@pytest.mark.parametrize("preset", PRESETS)
def test_uncorrelated_inputs_leave_the_nearest(preset: str) -> None:
    weight, scheme = weight_of(64, 64), FloatScheme(preset)
    moments = moments_of(torch.eye(64) * 3)
    found, plain = gptq_floats(weight, scheme, moments)[0], to_preset(weight, scheme, search=True)[0]
    assert torch.equal(found.dequantize(), plain.dequantize())


def test_it_is_optimal_brain_quantization() -> None:
    weight, x = weight_of(20, 64), inputs(500, 64)
    moments, scheme = moments_of(x), FloatScheme("NVFP4A16")
    found = gptq_floats(weight, scheme, moments)[0]
    plain = to_preset(weight, scheme, search=True)[0]
    assert plain.global_scale is not None
    scale = (plain.scale.float() / plain.global_scale).repeat_interleave(16, 1).double()
    sizes = torch.tensor([*SIZES, *(-size for size in SIZES[1:])], dtype=torch.float64)
    hessian = moments.hessian / moments.num_tokens
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    order, left = hessian.diagonal().argsort(descending=True, stable=True), weight.double().clone()
    expected = torch.zeros_like(left)
    for at, column in enumerate(order):
        distance = (left[:, column, None] / scale[:, column, None] - sizes).abs()
        expected[:, column] = sizes[distance.argmin(1)] * scale[:, column]
        rest = order[at:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        left[:, rest] -= torch.outer((left[:, column] - expected[:, column]) / inverse[0, 0], inverse[0])
    # float32 against float64: a value on the edge between two sizes may fall either way
    assert ((found.dequantize() - expected).abs() > 1e-5).float().mean() < 0.01


def test_without_tokens_it_is_refused_by_name() -> None:
    with pytest.raises(PowertrainError, match="up_proj: gptq needs calibration tokens"):
        gptq_floats(weight_of(8, 64), FloatScheme("MXFP4A16"), Moments.zeros(64, torch.device("cpu")), name="up_proj")
