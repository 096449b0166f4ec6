"""Products whose inputs are sliced among a program's warps, against float64 ones: on a GPU, or interpreted."""

from __future__ import annotations

import pytest
import torch

from powertrain.kernels.fused import silu_mul
from powertrain.model.gpu_weights import Int4Blocked
from powertrain.model.weights import IntWeight

pytest.importorskip("triton")

from powertrain.kernels.gpu import int4_matmul, matmul, sliced_matmul, tuned_table
from powertrain.kernels.gpu.sliced_matmul import SlicedConfig

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# the interpreter computes bfloat16 wrongly
DTYPES = [torch.bfloat16] if HAS_GPU else [torch.float16]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

each_config = pytest.mark.parametrize("config", [SlicedConfig(16, 4, 64, 3), SlicedConfig(8, 2, 128, 2)])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_gate = pytest.mark.parametrize("is_gated", [False, True])
each_count = pytest.mark.parametrize("rows", [1, 8, 21])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def some_rows(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return (normal(rows, inputs, seed=1) * 0.3).to(dtype)


def difference(got: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, is_gated: bool) -> float:
    expected = x.double() @ dense.double().t()
    expected = silu_mul.reference(expected.to(x.dtype)).double() if is_gated else expected
    assert (got.shape, got.dtype) == (expected.shape, x.dtype)
    return float((got.double() - expected).norm() / expected.norm())


@each_dtype
@each_config
@each_gate
@each_count
@pytest.mark.parametrize("has_zero", [False, True])
@pytest.mark.parametrize(("inputs", "groups"), [(1024, 8), (384, 3), (640, 1), (320, 5)])
def test_4_bit_weights(
    inputs: int, groups: int, has_zero: bool, rows: int, is_gated: bool, config: SlicedConfig, dtype: torch.dtype
) -> None:
    """Blocks of 128 and 64 inputs, a group each or one for all; more slices than blocks are left."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (70, inputs), dtype=torch.int8, generator=generator)
    zero = torch.randint(-8, 8, (70, groups), dtype=torch.int8, generator=generator) if has_zero else None
    scale = (torch.rand(70, groups, generator=generator) * 0.01 + 0.001).to(torch.float16)
    weight = IntWeight(values, scale, zero, 4)
    packed = Int4Blocked.pack(weight, DEVICE)
    assert packed is not None
    x = some_rows(rows, inputs, dtype)
    got = sliced_matmul.sliced_int4_product(x, packed._blocks, config, is_gated)
    assert difference(got, x, weight.dequantize().to(DEVICE), is_gated) < (2 if is_gated else 1) * TOLERANCE[dtype]


@each_dtype
@each_config
@each_gate
@each_count
@pytest.mark.parametrize("inputs", [1024, 200])
def test_float_weights(inputs: int, rows: int, is_gated: bool, config: SlicedConfig, dtype: torch.dtype) -> None:
    weight, x = normal(70, inputs, seed=2).to(dtype), some_rows(rows, inputs, dtype)
    got = sliced_matmul.sliced_product(x, weight, config, is_gated)
    assert difference(got, x, weight, is_gated) < (2 if is_gated else 1) * TOLERANCE[dtype]


def test_only_what_was_measured_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table's entry of the next larger number of rows is found by each product, and by no other."""
    asked: list[tuple[str, int, int, bool]] = []

    def found(
        product: str, device: torch.device, out_features: int, in_features: int, num_rows: int, is_gated: bool
    ) -> dict[str, int]:
        asked.append((product, out_features, num_rows, is_gated))
        return {"outputs": 16, "slices": 4, "inputs": 64, "num_stages": 3}

    def taken(x: torch.Tensor, *rest: object) -> str:
        return "sliced"

    monkeypatch.setattr(sliced_matmul, "measured", found)
    monkeypatch.setattr(matmul, "sliced_product", taken)
    monkeypatch.setattr(int4_matmul, "sliced_int4_product", taken)
    x = torch.zeros(5, 256, dtype=torch.bfloat16)
    floats = torch.zeros(32, 256, dtype=torch.bfloat16)
    packed = Int4Blocked.pack(IntWeight(torch.zeros(32, 256, dtype=torch.int8), torch.ones(32, 2), None, 4), x.device)
    assert packed is not None
    assert matmul.dense_linear(x, floats) == matmul.gated_linear(x, floats) == "sliced"
    assert int4_matmul.int4_linear(x, packed._blocks, False) == "sliced"
    wanted = [("dense_linear", 32, False), ("dense_linear", 16, True), ("int4", 32, False)]
    assert asked == [(f"sliced {product} bfloat16", out, 5, is_gated) for product, out, is_gated in wanted]
    assert sliced_matmul.sliced_config("int4", x.half(), 32, False) is None
    assert tuned_table.rows_of_entry(5) == 16
