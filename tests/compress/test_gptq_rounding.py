"""GPTQ on one matrix: its outputs beat rounding to nearest, and equal a textbook version that nobody made fast."""

from __future__ import annotations

import pytest
import torch

from powertrain.compress.gptq import GptqOptions, Moments, gptq
from powertrain.compress.quantize import rtn
from powertrain.compress.ranges import choose_range
from powertrain.model.weights import IntWeight
from powertrain.types import PowertrainError, QuantScheme


def inputs(num: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a few large directions, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)
    return torch.randn(num, width, generator=generator) @ mix


def moments_of(x: torch.Tensor, original: torch.Tensor | None = None) -> Moments:
    moments = Moments.zeros(x.shape[1], x.device, has_shift=original is not None)
    for at in range(0, len(x), 100):
        moments.add(x[at : at + 100], None if original is None else original[at : at + 100])
    return moments


def output_error(quantized: IntWeight, weight: torch.Tensor, x: torch.Tensor, original: torch.Tensor) -> float:
    wanted = original @ weight.t()
    return float((x @ quantized.dequantize().t() - wanted).square().sum() / wanted.square().sum())


def textbook(weight: torch.Tensor, scheme: QuantScheme, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Optimal brain quantization in a fixed order, float64: the inverse of what is left is made anew at each column."""
    groups = weight.view(len(weight), -1, scheme.group_size or weight.shape[1])
    scale, zero = choose_range(groups, scheme.num_bits, scheme.symmetric, "mse", torch.float32, "w")
    size, width = groups.shape[-1], weight.shape[1]
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    order, left = hessian.diagonal().argsort(descending=True, stable=True), weight.double().clone()
    low, high = -(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1) - 1
    values = torch.zeros_like(left)
    for at, column in enumerate(order):
        s = scale[:, column // size].double()
        z = torch.zeros_like(s) if zero is None else zero[:, column // size].double()
        values[:, column] = torch.round(left[:, column] / s + z).clamp(low, high)
        error = left[:, column] - (values[:, column] - z) * s
        rest = order[at:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        left[:, rest] -= torch.outer(error / inverse[0, 0], inverse[0])
    return values


@pytest.mark.parametrize(("group_size", "symmetric"), [(None, True), (32, True), (32, False)])
def test_it_is_optimal_brain_quantization_in_the_order_of_activations(group_size: int | None, symmetric: bool) -> None:
    weight, x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)), inputs(500, 64)
    scheme, moments = QuantScheme(num_bits=4, group_size=group_size, symmetric=symmetric), moments_of(x)
    quantized, _ = gptq(weight, scheme, moments)
    expected = textbook(weight, scheme, moments.hessian / moments.num_tokens, 0.01)
    # float32 against float64: a value on the edge between two integers may fall either way
    assert (quantized.values != expected).float().mean() < 0.01


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 64])
def test_outputs_are_nearer_than_those_of_rounding_to_nearest(num_bits: int, group_size: int | None) -> None:
    weight, x = torch.randn(100, 192, generator=torch.Generator().manual_seed(2)), inputs(1000, 192)
    scheme = QuantScheme(num_bits=num_bits, group_size=group_size)
    other = inputs(400, 192, seed=0)[200:]
    found, plain = gptq(weight, scheme, moments_of(x))[0], rtn(weight, scheme)[0]
    assert output_error(found, weight, other, other) < 0.6 * output_error(plain, weight, other, other)


def test_ranges_that_know_what_inputs_are_worth_leave_outputs_nearer() -> None:
    x, other = inputs(2000, 192), inputs(400, 192, seed=0)[200:]
    moments, scheme = moments_of(x), QuantScheme(num_bits=3)
    errors: dict[str, float] = {"mse": 0.0, "weighted": 0.0}
    for seed in range(3):
        weight = torch.randn(96, 192, generator=torch.Generator().manual_seed(seed))
        for observer in errors:
            found, _ = gptq(weight, scheme, moments, GptqOptions(observer=observer))  # type: ignore[arg-type]
            errors[observer] += output_error(found, weight, other, other)
    assert errors["weighted"] < 0.95 * errors["mse"]


def test_asymmetric_correction_aims_at_the_outputs_before_compression() -> None:
    weight, original = torch.randn(96, 128, generator=torch.Generator().manual_seed(3)), inputs(3000, 128)
    x = original + 0.1 * inputs(3000, 128, seed=9)
    scheme, moments = QuantScheme(num_bits=4), moments_of(x, original)
    plain, _ = gptq(weight, scheme, moments_of(x))
    ignored, _ = gptq(weight, scheme, moments, GptqOptions(correction=0.0))
    assert torch.equal(plain.values, ignored.values)
    corrected, _ = gptq(weight, scheme, moments_of(x, original), GptqOptions(correction=1.0))
    assert output_error(corrected, weight, x, original) < output_error(plain, weight, x, original)


def test_inputs_that_are_always_zero_cost_nothing_and_get_zero() -> None:
    weight, x = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)), inputs(300, 64)
    x[:, 10:20] = 0.0
    quantized, _ = gptq(weight, QuantScheme(num_bits=4), moments_of(x))
    assert not quantized.values[:, 10:20].any()


def test_few_tokens_raise_the_damping_instead_of_failing() -> None:
    weight, x = torch.randn(8, 64), inputs(3, 64)
    quantized, _ = gptq(weight, QuantScheme(num_bits=4), moments_of(x), GptqOptions(damping_frac=1e-18))
    assert torch.isfinite(quantized.dequantize()).all()


def test_what_cannot_be_is_refused_by_name() -> None:
    weight, scheme = torch.randn(8, 64), QuantScheme(num_bits=4)
    with pytest.raises(PowertrainError, match="up_proj: gptq needs calibration tokens"):
        gptq(weight, scheme, Moments.zeros(64, weight.device), name="up_proj")
    broken = inputs(10, 64)
    broken[3, 3] = float("nan")
    with pytest.raises(PowertrainError, match="up_proj: its inputs hold NaN"):
        gptq(weight, scheme, moments_of(broken), name="up_proj")
