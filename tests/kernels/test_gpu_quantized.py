"""Triton products with quantized weights against their references; on a CPU under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from powertrain.kernels.fused import silu_mul
from powertrain.kernels.gpu import conversions, fused, int4_matmul, quantized
from powertrain.kernels.quantized import Int4Blocks, dequantize_float8, dequantize_int4_blocks
from powertrain.kernels.rounding import (
    add_rms_norm_rounded,
    quantize_to_float8,
    quantize_to_int8,
    silu_mul_rounded,
)
from powertrain.model.gpu_weights import Int4Blocked
from powertrain.model.weights import IntWeight

HAS_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter's own
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# the interpreter computes bfloat16 wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def difference(out, expected):
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def int4_blocks(out, inputs, groups, has_zero, seed=0) -> tuple[Int4Blocks, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (out, inputs), dtype=torch.int8, generator=generator)
    zero = torch.randint(-8, 8, (out, groups), dtype=torch.int8, generator=generator) if has_zero else None
    scale = (torch.rand(out, groups, generator=generator) * 0.01 + 0.001).to(torch.float16)
    weight = IntWeight(values, scale, zero, 4)
    packed = Int4Blocked.pack(weight, DEVICE)
    assert packed is not None
    return packed._blocks, weight.dequantize().to(DEVICE)


@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize(("inputs", "groups"), [(256, 2), (256, 1), (192, 3), (160, 5), (576, 1)])
def test_blocks_keep_the_integers(inputs, groups, has_zero):
    blocks, dense = int4_blocks(40, inputs, groups, has_zero)
    assert torch.equal(dequantize_int4_blocks(blocks, torch.float32), dense)
    assert difference(conversions.int4_floats(blocks, torch.float16), dense) < 1e-3


def test_groups_that_no_block_divides_have_no_blocks():
    assert Int4Blocked.pack(IntWeight(torch.zeros(4, 48, dtype=torch.int8), torch.ones(4, 2), None, 4), DEVICE) is None


CONFIGS = [
    quantized.QuantizedConfig(32, 1, False, 2, 2),
    quantized.QuantizedConfig(16, 3, False, 2, 3),
    quantized.QuantizedConfig(64, 1, True, 4, 2),
    quantized.QuantizedConfig(64, 2, True, 4, 3),
]


@each_dtype
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("rows", "out", "inputs", "groups"), [(1, 70, 256, 2), (5, 64, 192, 6), (33, 24, 512, 1)])
@pytest.mark.parametrize("has_zero", [False, True])
def test_4_bit_products_of_few_rows(rows, out, inputs, groups, has_zero, config, dtype, monkeypatch):
    monkeypatch.setattr(int4_matmul, "config_for", lambda *arguments: config)
    blocks, dense = int4_blocks(out, inputs, groups, has_zero)
    x = normal(rows, inputs, dtype=dtype, seed=1)
    expected = x.double() @ dense.double().t()
    assert difference(int4_matmul.int4_linear(x, blocks, False), expected) < TOLERANCE[dtype]


@each_dtype
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3]])
def test_4_bit_products_of_many_rows_go_in_tiles(config, has_zero, dtype, monkeypatch):
    monkeypatch.setattr(int4_matmul, "config_for", lambda *arguments: config)
    blocks, dense = int4_blocks(70, 256, 2, has_zero)
    x = normal(int4_matmul.TILE_ROWS + 3, 256, dtype=dtype, seed=1)
    expected = x.double() @ dense.double().t()
    assert difference(int4_matmul.int4_linear(x, blocks, False), expected) < TOLERANCE[dtype]


@each_dtype
@pytest.mark.parametrize("swaps", [False, True])
def test_4_bit_products_gate_as_the_reference_does(swaps, dtype, monkeypatch):
    config = quantized.QuantizedConfig(32, 1, swaps, 4, 2)
    monkeypatch.setattr(int4_matmul, "config_for", lambda *arguments: config)
    blocks, dense = int4_blocks(88, 256, 2, True)
    x = normal(3, 256, dtype=dtype, seed=1)
    expected = silu_mul.reference((x.double() @ dense.double().t() * 4).to(dtype))
    blocks = blocks._replace(scale=blocks.scale * 4)
    assert difference(int4_matmul.int4_linear(x, blocks, True), expected) < 2 * TOLERANCE[dtype]


def float8(out, inputs, has_blocks):
    values = normal(out, inputs, seed=2).to(torch.float8_e4m3fn)
    shape = (-(-out // 128), -(-inputs // 128)) if has_blocks else (out,)
    return values, torch.rand(*shape, generator=torch.Generator().manual_seed(3)).to(DEVICE) + 0.1


@each_dtype
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("rows", "out", "inputs"), [(1, 70, 256), (5, 64, 200), (33, 200, 384)])
@pytest.mark.parametrize("kind", ["fp8", "fp8 blocks", "int8"])
def test_8_bit_products_of_few_rows(rows, out, inputs, kind, config, dtype, monkeypatch):
    monkeypatch.setattr(quantized, "config_for", lambda *arguments: config)
    values, scale = float8(out, inputs, kind == "fp8 blocks")
    if kind == "int8":
        values = (normal(out, inputs, seed=2) * 40).clamp(-128, 127).to(torch.int8)
    x = normal(rows, inputs, dtype=dtype, seed=1)
    dense = dequantize_float8(values, scale)
    assert (
        difference(quantized.byte_linear(x, values, scale, False), x.double() @ dense.double().t()) < TOLERANCE[dtype]
    )
    assert difference(conversions.byte_floats(values, scale, torch.float16), dense) < 1e-3


@each_dtype
@pytest.mark.parametrize("has_blocks", [False, True])
def test_8_bit_products_gate_as_the_reference_does(has_blocks, dtype):
    values, scale = float8(256, 256, has_blocks)
    x = normal(3, 256, dtype=dtype, seed=1) * 0.05
    expected = silu_mul.reference((x.double() @ dequantize_float8(values, scale).double().t()).to(dtype))
    assert difference(quantized.byte_linear(x, values, scale, True), expected) < 2 * TOLERANCE[dtype]


def test_more_rows_take_the_whole_matrix_as_floats():
    blocks, dense = int4_blocks(24, 256, 2, True)
    x = normal(quantized.MAX_ROWS + 1, 256)
    assert difference(int4_matmul.int4_linear(x, blocks, False), x @ dense.t()) < 2e-6
    values, scale = float8(24, 256, True)
    assert difference(quantized.byte_linear(x, values, scale, False), x @ dequantize_float8(values, scale).t()) < 2e-6


@each_dtype
def test_rows_are_rounded_to_the_references_grids(dtype):
    x = normal(5, 200, dtype=dtype) * torch.tensor([1.0, 1e-3, 50.0, 0.0, 3.0], device=DEVICE).to(dtype)[:, None]
    for own, reference in ((torch.int8, quantize_to_int8), (torch.float8_e4m3fn, quantize_to_float8)):
        values, scale = conversions.quantize_rows(x, own)
        expected, expected_scale = reference(x)
        torch.testing.assert_close(scale, expected_scale[:, 0], rtol=1e-6, atol=0)
        assert share_of_wrong(values, expected) < 0.01


@each_dtype
@pytest.mark.parametrize("to", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_norms_and_gates_round_as_the_reference_does(to, dtype):
    x, weight = normal(3, 200, dtype=dtype), normal(200, dtype=dtype, seed=2)
    for delta in (normal(3, 200, dtype=dtype, seed=1), normal(2, 3, 200, seed=1)):
        own, expected = x.clone(), x.clone()
        values, scale = fused.add_rms_norm_rounded(own, delta, weight, 1e-5, to)
        expected_values, expected_scale = add_rms_norm_rounded.reference(expected, delta, weight, 1e-5, to)
        assert difference(own, expected) < TOLERANCE[dtype]
        torch.testing.assert_close(scale, expected_scale, rtol=TOLERANCE[dtype], atol=0)
        assert share_of_wrong(values, expected_values) < 0.05
    gate_up = normal(3, 400, dtype=dtype)
    values, scale = fused.silu_mul_rounded(gate_up, to)
    expected_values, expected_scale = silu_mul_rounded.reference(gate_up, to)
    torch.testing.assert_close(scale, expected_scale, rtol=TOLERANCE[dtype], atol=0)
    assert share_of_wrong(values, expected_values) < 0.05


def share_of_wrong(values, expected):
    """Where rounding began a step apart, a quotient on the border of two steps falls to the other side."""
    wrong = values.float() != expected.float()
    if values.dtype == torch.float8_e4m3fn and not HAS_GPU:
        # the interpreter loses the carry where the mantissa rounds up to the next power of two
        wrong &= expected.float().abs().frexp().mantissa != 0.5
    return float(wrong.float().mean())


def test_integers_take_both_scales():
    product = torch.tensor([[3, -4], [5, 2**20]], dtype=torch.int32, device=DEVICE)
    rows, columns = torch.tensor([2.0, 0.5], device=DEVICE), torch.tensor([1.0, 0.25], device=DEVICE)
    out = conversions.scale_integers(product, rows, columns, torch.float32)
    assert out.tolist() == [[6.0, -2.0], [2.5, 2**17]]


@pytest.mark.skipif(not HAS_GPU, reason="the library's 8-bit products run on a GPU")
def test_many_rows_multiply_rounded_inputs():
    from powertrain.kernels.quantized import float8_linear, int8_rounded_linear

    x = normal(300, 512, dtype=torch.bfloat16)
    values, scale = float8(256, 512, False)
    for is_gated in (False, True):
        out = quantized.float8_linear(x, values, scale, True, is_gated)
        assert difference(out, float8_linear.reference(x, values, scale, True, is_gated)) < 1.5e-2
    integers = (normal(256, 512, seed=2) * 40).clamp(-128, 127).to(torch.int8)
    out = quantized.int8_rounded_linear(x, integers, scale)
    assert difference(out, int8_rounded_linear.reference(x, integers, scale)) < 1.5e-2
