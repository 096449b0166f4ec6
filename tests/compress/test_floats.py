"""Matrices rounded to floats of 8 and 4 bits: the compressed-tensors library's bits, and nearer with a search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.compress.floats import to_float8, to_mxfp4, to_nvfp4
from powertrain.compress.quantize import weight_error
from powertrain.model.float4 import Float4Weight
from powertrain.types import PowertrainError

Tensors = dict[str, torch.Tensor]


def gaussian(rows: int, columns: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


def library_float4(weight: torch.Tensor, preset: str) -> Tensors:
    """Scales by the library's observers' arithmetic, codes by its compressor."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    groups = weight.unflatten(1, (-1, scheme.weights.group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    divisor = generate_gparam(weight.amin(), weight.amax()) if preset == "NVFP4A16" else None
    scale, _ = calculate_qparams(low, high, scheme.weights, global_scale=divisor)
    state = {"weight": weight, "weight_scale": scale}
    if divisor is not None:
        state["weight_global_scale"] = divisor
    compressor = NVFP4PackedCompressor if divisor is not None else MXFP4PackedCompressor
    return compressor.compress(state, scheme)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), seed=st.integers(0, 999), power=st.integers(-60, 60))
def test_nvfp4_without_search_is_the_librarys(rows: int, groups: int, seed: int, power: int) -> None:
    weight = gaussian(rows, 16 * groups, seed, 2.0**power)
    theirs = library_float4(weight, "NVFP4A16")
    ours, _ = to_nvfp4(weight, search=False)
    assert ours.global_scale is not None
    assert torch.equal(ours.global_scale, theirs["weight_global_scale"])
    assert torch.equal(ours.scale.float(), theirs["weight_scale"].float())
    assert torch.equal(ours.packed, theirs["weight_packed"])


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), seed=st.integers(0, 999), power=st.integers(-130, 125))
def test_mxfp4_without_search_is_the_librarys(rows: int, groups: int, seed: int, power: int) -> None:
    weight = gaussian(rows, 32 * groups, seed, 2.0**power).clamp(-3e38, 3e38)
    weight[0, :32] = 0
    theirs = library_float4(weight, "MXFP4A16")
    ours, _ = to_mxfp4(weight, search=False)
    assert torch.equal(ours.scale, theirs["weight_scale"])
    assert torch.equal(ours.packed, theirs["weight_packed"])


@pytest.mark.parametrize(
    ("strategy", "preset"), [("channel", "FP8_DYNAMIC"), ("tensor", "FP8"), ("block", "FP8_BLOCK")]
)
@pytest.mark.parametrize("shape", [(24, 40), (300, 200), (128, 256)])
def test_float8_is_the_librarys(strategy: Any, preset: str, shape: tuple[int, int]) -> None:
    weight = gaussian(*shape, spread=0.02)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    ours, error = to_float8(weight, strategy)
    scale = ours.scale if strategy == "block" else ours.scale.unsqueeze(1)
    theirs = FloatQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    assert torch.equal(ours.values.float(), theirs["weight"].float())
    rows, columns = (128, 128) if strategy == "block" else (shape[0] if strategy == "tensor" else 1, shape[1])
    for row in range(0, shape[0], rows):
        for column in range(0, shape[1], columns):
            expected = weight[row : row + rows, column : column + columns].abs().amax() / 448
            found = ours.scale[row // rows, column // columns] if strategy == "block" else ours.scale[row]
            assert found == expected
    assert error == weight_error(weight, ours.dequantize())


ROUNDED: list[tuple[str, Callable[[torch.Tensor, bool], tuple[Float4Weight, float]], float, float]] = [
    ("nvfp4", to_nvfp4, 0.0090, 0.0067),
    ("mxfp4", to_mxfp4, 0.0126, 0.0125),
]


@pytest.mark.parametrize(("kind", "quantize", "plain", "searched"), ROUNDED)
def test_a_search_lowers_the_known_error_of_gaussian_weights(
    kind: str, quantize: Callable[[torch.Tensor, bool], tuple[Float4Weight, float]], plain: float, searched: float
) -> None:
    found = []
    for search in (False, True):
        # powers of two suit some spreads better than others: the mean over an octave is what a format costs
        errors = [quantize(gaussian(16, 1024, seed, 2 ** (seed / 8)), search)[1] for seed in range(8)]
        found.append(sum(errors) / 8)
    assert found == pytest.approx([plain, searched], rel=0.02)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), is_nvfp4=st.booleans(), tail=st.integers(1, 9))
def test_a_search_is_never_worse(seed: int, is_nvfp4: bool, tail: int) -> None:
    quantize = to_nvfp4 if is_nvfp4 else to_mxfp4
    weight = gaussian(8, 64, seed) ** tail
    plain, searched = (quantize(weight, search) for search in (False, True))
    size = 16 if is_nvfp4 else 32
    errors = [
        (weight - made.dequantize()).unflatten(1, (-1, size)).square().sum(-1, dtype=torch.float64)
        for made, _ in (plain, searched)
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert searched[1] == weight_error(weight, searched[0].dequantize())


QUANTIZE = [to_nvfp4, to_mxfp4]


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("spread", [1e-30, 1e-12, 1.0, 1e12, 1e30, 5e37])
def test_tiny_and_huge_weights_keep_the_error_of_others(quantize: Any, search: bool, spread: float) -> None:
    weight = gaussian(16, 64).clamp(-4, 4) * spread
    made, _ = quantize(weight, search)
    decoded = made.dequantize()
    assert torch.isfinite(decoded).all()
    assert weight_error(weight.double() / spread, decoded.double() / spread) < 0.016


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("quantize", QUANTIZE)
def test_zeros_stay_zeros(quantize: Any, search: bool) -> None:
    made, error = quantize(torch.zeros(4, 64), search)
    assert error == 0
    assert not made.dequantize().any()
    weight = gaussian(4, 64)
    weight[:, 32:] = 0
    assert not quantize(weight, search)[0].dequantize()[:, 32:].any()


def test_groups_that_are_nothing_beside_the_largest_are_kept_where_float8_reaches() -> None:
    weight = torch.full((1, 32), 1.0)
    weight[0, 16:] = 1e-6
    decoded = to_nvfp4(weight, search=False)[0].dequantize()
    assert decoded[0, 16:].tolist() == pytest.approx([1e-6] * 16, rel=0.3)
    weight[0, 16:] = 1e-9
    assert not to_nvfp4(weight, search=True)[0].dequantize()[0, 16:].any()


def test_matrices_of_one_product_can_share_a_divisor() -> None:
    weights = [gaussian(8, 64, seed, seed + 1.0) for seed in range(3)]
    largest = max(float(weight.abs().amax()) for weight in weights)
    made = [to_nvfp4(weight, search=True, absmax=largest)[0] for weight in weights]
    assert len({float(one.global_scale) for one in made if one.global_scale is not None}) == 1
    with pytest.raises(PowertrainError, match=r"up_proj: absmax 0\.5 is below its largest weight"):
        to_nvfp4(weights[0], search=True, absmax=0.5, name="up_proj")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantize", QUANTIZE)
def test_half_precision_weights_are_rounded_as_the_floats_they_are(quantize: Any, dtype: torch.dtype) -> None:
    weight = gaussian(8, 64).to(dtype)
    assert torch.equal(quantize(weight, True)[0].packed, quantize(weight.float(), True)[0].packed)


def test_rows_are_sought_apart() -> None:
    """More weights than are sought at once."""
    weight = gaussian(520, 2048)
    whole, _ = to_nvfp4(weight, search=True)
    end, _ = to_nvfp4(weight[510:], search=True, absmax=float(weight.abs().amax()))
    assert torch.equal(whole.packed[510:], end.packed)


@pytest.mark.parametrize("quantize", [to_float8, lambda w, name: to_nvfp4(w, True, name=name)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_damaged_weights_are_refused_by_name(quantize: Any, bad: float) -> None:
    weight = gaussian(4, 64)
    weight[2, 3] = bad
    with pytest.raises(PowertrainError, match=r"layers\.0\.up: holds NaN or infinity"):
        quantize(weight, name="layers.0.up")


def test_other_matrices_are_refused_by_name() -> None:
    with pytest.raises(PowertrainError, match="up: groups of 16 do not divide its rows of 40"):
        to_nvfp4(gaussian(4, 40), False, name="up")
    with pytest.raises(PowertrainError, match="up: groups of 32 do not divide its rows of 48"):
        to_mxfp4(gaussian(4, 48), False, name="up")
    with pytest.raises(PowertrainError, match="up: only a float matrix can be quantized"):
        to_mxfp4(torch.zeros(4, 64, dtype=torch.int8), False, name="up")
    with pytest.raises(PowertrainError, match="up: strategy 'group' is unknown"):
        to_float8(gaussian(4, 40), "group", name="up")  # type: ignore[arg-type]
