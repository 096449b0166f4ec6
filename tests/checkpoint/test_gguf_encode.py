"""Encoders of GGUF's weight types: the legacy ones bit-equal to the `gguf` package, K types judged by its decoder."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.gguf_blocks import BLOCKS, dequantize
from powertrain.checkpoint.gguf_encode import ENCODERS, encode
from powertrain.checkpoint.gguf_encode_k import K_ENCODERS
from powertrain.types import PowertrainError

LEGACY = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TINY_SCALE = 1e-30
quick = settings(max_examples=60, deadline=None)


def theirs(type_name: str, blocks: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type_name])


def nmse(weight: torch.Tensor, type_name: str, blocks: np.ndarray) -> float:
    back = torch.from_numpy(theirs(type_name, blocks)).view_as(weight).double()
    return float((back - weight).square().sum() / weight.double().square().sum())


@pytest.mark.parametrize("type_name", LEGACY)
@quick
@given(data=st.data())
def test_legacy_blocks_are_those_of_the_gguf_package(type_name: str, data: st.DataObject) -> None:
    seed, scale = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.sampled_from([TINY_SCALE, 1e-3, 1.0, 3e4]))
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((3, 96)) * scale).astype(np.float32).clip(-65000, 65000)
    rows[0, :32] = data.draw(st.sampled_from([0.0, scale]))  # a constant block
    rows[1, :64] = np.round(rows[1, :64] / scale) * scale  # ties, for size and for rounding
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[type_name]).view(np.uint8)
    assert np.array_equal(encode(type_name, torch.from_numpy(rows)), expected.reshape(3, -1))


@pytest.mark.parametrize("type_name", K_TYPES)
@quick
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(["normal", "heavy", "positive", "lone", "zero"]))
def test_k_blocks_decode_everywhere_and_are_no_worse_than_plain_rounding(type_name: str, seed: int, shape: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 512, generator=generator) * 0.02
    if shape == "heavy":
        weight = weight**3
    elif shape == "positive":
        weight = weight.abs() + 0.1
    elif shape == "lone":
        weight[:, 1:] = 0
    elif shape == "zero":
        weight[1] = 0
    blocks = encode(type_name, weight)
    assert np.array_equal(theirs(type_name, blocks), dequantize(type_name, blocks).numpy())
    plain = K_ENCODERS[type_name](weight.view(-1, 256), is_plain=True).numpy()
    assert nmse(weight, type_name, blocks) <= nmse(weight, type_name, plain) * (1 + 1e-6)
    if shape == "zero":
        assert not dequantize(type_name, blocks)[1].any()


def test_more_bits_err_less() -> None:
    """In the published order, and each search gains on plain rounding where weights look like weights."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [nmse(weight, name, encode(name, weight)) for name in ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")]
    assert errors == sorted(errors)
    plain = [nmse(weight, name, K_ENCODERS[name](weight.view(-1, 256), is_plain=True).numpy()) for name in K_TYPES]
    assert all(found < 0.9 * worse for found, worse in zip(reversed(errors), plain, strict=True))
    for k_type, legacy in (("Q4_K", "Q4_0"), ("Q5_K", "Q5_0")):  # of equal size
        assert nmse(weight, k_type, encode(k_type, weight)) < nmse(weight, legacy, encode(legacy, weight))


@pytest.mark.parametrize("type_name", ENCODERS)
def test_a_matrix_that_lies_on_the_grid_comes_back(type_name: str) -> None:
    """Decoded blocks encoded again mean the same numbers, or nearly (K types search, and may settle beside them)."""
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
    once = dequantize(type_name, encode(type_name, weight))
    again = dequantize(type_name, encode(type_name, once))
    if type_name in LEGACY or type_name == "F32":
        torch.testing.assert_close(again, once, rtol=2e-3, atol=2e-3)
    else:
        assert float((again - once).square().sum()) < 0.1 * float((once - weight).square().sum())


@pytest.mark.parametrize(
    ("type_name", "value", "message"),
    [("Q4_0", float("nan"), "NaN"), ("Q8_0", float("inf"), "NaN"), ("Q4_K", 1e6, "float16"), ("F16", 1e6, "float16")],
)
def test_numbers_that_do_not_fit_are_refused(type_name: str, value: float, message: str) -> None:
    weight = torch.zeros(2, BLOCKS["Q4_K"][1])
    weight[1, 7] = value
    with pytest.raises(PowertrainError, match=message):
        encode(type_name, weight)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(PowertrainError, match="rows of 576 are no whole blocks of Q4_K"):
        encode("Q4_K", torch.zeros(2, 576))
