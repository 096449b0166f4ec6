"""Products of a single row against float64 ones: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from powertrain.kernels.fused import silu_mul
from powertrain.kernels.quantized import dequantize_float8
from powertrain.model.gpu_weights import Int4Blocked
from powertrain.model.weights import IntWeight

pytest.importorskip("triton")

from powertrain.kernels.gpu import int4_matmul, matmul, quantized, row_matmul, tuned_table
from powertrain.kernels.gpu.row_matmul import RowConfig

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.float16, torch.bfloat16]  # widened by their bits: that the interpreter does as a GPU
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

each_config = pytest.mark.parametrize("config", [RowConfig(8, 256, 4), RowConfig(16, 1024, 4)])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_gate = pytest.mark.parametrize("is_gated", [False, True])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def row(inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return (normal(1, inputs, seed=1) * 0.3).to(dtype)


def difference(got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, is_gated: bool) -> float:
    expected = x.double() @ dense.double().t()
    expected = silu_mul.reference(expected.to(x.dtype)).double() if is_gated else expected
    assert (got.shape, got.dtype) == (expected.shape, x.dtype)
    return float((got.double() - expected).norm() / expected.norm())


@each_dtype
@each_config
@each_gate
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize(("inputs", "groups"), [(1024, 8), (384, 3), (640, 1), (320, 5)])
def test_4_bit_rows(
    inputs: int, groups: int, has_zero: bool, is_gated: bool, config: RowConfig, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (70, inputs), dtype=torch.int8, generator=generator)
    zero = torch.randint(-8, 8, (70, groups), dtype=torch.int8, generator=generator) if has_zero else None
    scale = (torch.rand(70, groups, generator=generator) * 0.01 + 0.001).to(torch.float16)
    weight = IntWeight(values, scale, zero, 4)
    packed = Int4Blocked.pack(weight, DEVICE)
    assert packed is not None
    assert packed._blocks.nibbles == 4
    x = row(inputs, dtype)
    got = row_matmul.row_int4_product(x, packed._blocks, config, is_gated)
    assert difference(got, x, weight.dequantize().to(DEVICE), is_gated) < (2 if is_gated else 1) * TOLERANCE[dtype]


@each_dtype
@each_config
@each_gate
@pytest.mark.parametrize("inputs", [1024, 200])
@pytest.mark.parametrize("kind", ["fp8", "int8", "float"])
def test_8_bit_and_float_rows(kind: str, inputs: int, is_gated: bool, config: RowConfig, dtype: torch.dtype) -> None:
    values, scale = normal(70, inputs, seed=2), torch.rand(70).to(DEVICE) * 0.01 + 0.001
    x = row(inputs, dtype)
    if kind == "float":
        values = values.to(dtype)
        got, dense = row_matmul.row_product(x, values, None, config, is_gated), values
    else:
        narrow = values.to(torch.float8_e4m3fn) if kind == "fp8" else (values * 40).clamp(-128, 127).to(torch.int8)
        got, dense = row_matmul.row_product(x, narrow, scale, config, is_gated), dequantize_float8(narrow, scale)
    assert difference(got, x, dense, is_gated) < (2 if is_gated else 1) * TOLERANCE[dtype]


def test_only_what_was_measured_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table's entry of one row is found by each product, for one row alone."""
    asked: list[tuple[Any, ...]] = []

    def found(product: str, device: torch.device, key: tuned_table.Key) -> dict[str, int]:
        out_features, in_features, rows, is_gated = key
        assert rows == 1
        asked.append((product, out_features, in_features, is_gated))
        return {"outputs": 8, "inputs": 256, "num_warps": 4}

    def taken(x: torch.Tensor, *rest: object) -> str:
        return "row"

    monkeypatch.setattr(row_matmul, "entry", found)
    for module in (quantized, matmul):
        monkeypatch.setattr(module, "row_product", taken)
    monkeypatch.setattr(int4_matmul, "row_int4_product", taken)
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    floats = torch.zeros(32, 256, dtype=torch.bfloat16)
    bytes_of = floats.to(torch.float8_e4m3fn)
    blocks = Int4Blocked.pack(IntWeight(torch.zeros(32, 256, dtype=torch.int8), torch.ones(32, 2), None, 4), x.device)
    assert blocks is not None
    assert matmul.dense_linear(x, floats) == matmul.gated_linear(x, floats) == "row"
    assert quantized.byte_linear(x, bytes_of, torch.ones(32), True) == "row"
    assert int4_matmul.int4_linear(x, blocks._blocks, False) == "row"
    names = [
        ("row dense_linear", 32, False),
        ("row dense_linear", 16, True),
        ("row fp8", 16, True),
        ("row int4", 32, False),
    ]
    assert asked == [(f"{name} bfloat16", out, 256, is_gated) for name, out, is_gated in names]
    for other in (x.half(), x.expand(2, -1)):
        assert row_matmul.row_config("row fp8", other, 32, False) is None
