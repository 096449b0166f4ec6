"""The Triton product of rounded activations with 8-bit weights; on a CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from powertrain.kernels.fused import silu_mul
from powertrain.kernels.gpu import rounded_matmul
from powertrain.kernels.gpu.rounded_matmul import RoundedConfig, rounded_product
from powertrain.kernels.quantized import rounded_gated_linear, rounded_linear
from powertrain.kernels.rounding import quantize_to_float8, quantize_to_int8

HAS_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter's own
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# the interpreter computes bfloat16 wrongly
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32
# each turn of 128 inputs is summed to 14 bits by the tensor cores
TOLERANCE = 3e-3 if HAS_GPU else 2e-6

CONFIGS = [
    RoundedConfig(128, 64, 1, 128, 1, True, 4, 3),
    RoundedConfig(64, 64, 1, 128, 2, False, 4, 2),
    RoundedConfig(64, 64, 2, 128, 1, True, 4, 3),
    RoundedConfig(128, 32, 2, 256, 4, False, 8, 2),
]
each_kind = pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operands(rows, out, inputs, kind):
    """Rounded rows and weights with their scales, and the product of what they stand for in float64."""
    quantize = quantize_to_int8 if kind == torch.int8 else quantize_to_float8
    (x, x_scale), (values, scale) = quantize(normal(rows, inputs, seed=0)), quantize(normal(out, inputs, seed=1))
    expected = (x.double() * x_scale) @ (values.double() * scale).t()
    return [part.to(DEVICE) for part in (x, x_scale[:, 0], values, scale[:, 0])], expected.to(DEVICE)


def difference(out, expected):
    return float((out.double() - expected).norm() / expected.norm())


@each_kind
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("rows", "out", "inputs"), [(1, 70, 256), (70, 200, 400), (130, 136, 640)])
def test_products_are_those_of_what_was_rounded(rows, out, inputs, config, kind):
    given, expected = operands(rows, out, inputs, kind)
    product = rounded_product(*given, DTYPE, config)
    assert product.shape == (rows, out)
    assert product.dtype == DTYPE
    assert difference(product, expected) < TOLERANCE


@each_kind
def test_all_rows_of_a_step_fit_one_tile(kind):
    given, expected = operands(256, 128, 256, kind)
    product = rounded_product(*given, DTYPE, RoundedConfig(256, 64, 2, 128, 1, True, 8, 3))
    assert difference(product, expected) < TOLERANCE


@each_kind
def test_pieces_are_left_to_sum(kind):
    given, expected = operands(5, 70, 512, kind)
    pieces = rounded_product(*given, DTYPE, CONFIGS[1], keeps_pieces=True)
    assert pieces.shape == (2, 5, 70)
    assert pieces.dtype == torch.float32
    assert difference(pieces.double().sum(0), expected) < TOLERANCE


@each_kind
@pytest.mark.parametrize("swaps", [False, True])
def test_gates_as_the_reference_does(swaps, kind):
    given, expected = operands(70, 2 * 88, 256, kind)
    given[3], expected = given[3] * 0.1, expected * 0.1
    product = rounded_product(*given, DTYPE, RoundedConfig(128, 32, 2, 128, 1, swaps, 4, 2), is_gated=True)
    assert difference(product, silu_mul.reference(expected.to(DTYPE)).double()) < 2 * TOLERANCE


def test_integers_are_summed_exactly():
    generator = torch.Generator().manual_seed(0)
    x, values = (torch.randint(100, 128, (16, 4096), dtype=torch.int8, generator=generator) for _ in range(2))
    one = torch.ones(16, device=DEVICE)
    config = RoundedConfig(16, 16, 1, 128, 1, True, 4, 2)
    product = rounded_product(x.to(DEVICE), one, values.to(DEVICE), one, torch.float32, config)
    exact = x.long() @ values.long().t()
    # sums that float32 does not hold on the way; it rounds what comes out
    assert int(exact.min()) > 2**25
    assert torch.equal(product.cpu(), exact.float())


@pytest.fixture
def asked(monkeypatch):
    """What is looked up in the table of measured settings, which has an entry for everything."""
    asked = []

    def found(product, device, out_features, in_features, num_rows, is_gated):
        asked.append((product, out_features, in_features, num_rows, is_gated))
        return {**CONFIGS[2]._asdict(), "us": 1.0}

    monkeypatch.setattr(rounded_matmul, "measured", found)
    return asked


@each_kind
def test_measured_settings_are_taken_for_bfloat16(kind, asked):
    x = torch.zeros(70, 256, dtype=kind)
    assert rounded_matmul.rounded_config(x, 64, torch.bfloat16, is_gated=True) == CONFIGS[2]
    assert asked == [("int8 rounded bfloat16" if kind == torch.int8 else "fp8 rounded bfloat16", 64, 256, 70, True)]
    assert rounded_matmul.rounded_config(x, 64, torch.float16) is None


@each_kind
@pytest.mark.parametrize("is_measured", [False, True])
def test_rounds_what_it_gates(kind, is_measured, monkeypatch):
    """With and without settings, the library's place taken by the reference."""
    given, _ = operands(5, 2 * 88, 256, kind)
    given[3] = given[3] * 0.1
    config = RoundedConfig(64, 64, 2, 128, 1, True, 4, 2) if is_measured else None
    monkeypatch.setattr(rounded_matmul, "rounded_config", lambda *_, **__: config)
    monkeypatch.setattr(rounded_matmul, "library_product", rounded_linear.reference)
    values, scale = rounded_matmul.rounded_gated_linear(*given, DTYPE, torch.int8)
    expected, expected_scale = rounded_gated_linear.reference(*given, DTYPE, torch.int8)
    torch.testing.assert_close(scale, expected_scale, rtol=2 * TOLERANCE, atol=0)
    assert values.dtype == torch.int8
    assert float((values.float() - expected.float()).abs().max()) <= 1
    assert float((values != expected).float().mean()) < 0.05


@pytest.mark.skipif(not HAS_GPU, reason="the library's 8-bit products run on a GPU")
@each_kind
def test_the_library_multiplies_where_nothing_was_measured(kind):
    given, expected = operands(300, 256, 512, kind)
    assert difference(rounded_matmul.rounded_linear(*given, torch.bfloat16), expected) < TOLERANCE
