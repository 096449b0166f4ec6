"""4-bit floats: every code, every tie and every exponent, judged by the compressed-tensors library."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.kernels.float4 import (
    SIZES,
    float4_codes,
    pack_codes,
    power_of_two,
    power_of_two_for,
    round_to_float4,
    unpack_float4,
)


def test_every_byte_is_the_librarys_pair_of_codes() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    ours = unpack_float4(packed)
    theirs = unpack_fp4_from_uint8(packed, 16, 32, torch.float32)
    assert torch.equal(ours, theirs)
    assert torch.equal(torch.signbit(ours), torch.signbit(theirs))
    assert sorted(set(ours.abs().flatten().tolist())) == list(SIZES)
    # the library writes the same bytes again
    assert torch.equal(pack_fp4_to_uint8(ours), packed)


def test_every_code_is_found_again() -> None:
    codes = torch.tensor([[code for code in range(16) if code != 8]])  # minus zero is written as zero
    values = torch.tensor([*SIZES, *(-size for size in SIZES)])[codes]
    assert torch.equal(float4_codes(values), codes.to(torch.uint8))


TIES = [
    *((0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)),
    *((0.0, 0.0), (6.0, 6.0), (6.99, 6.0), (7.0, 6.0), (8.0, 6.0), (1e30, 6.0)),
]


@pytest.mark.parametrize(("x", "expected"), TIES)
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_go_to_the_even_code(x: float, expected: float, sign: int) -> None:
    assert round_to_float4(torch.tensor(sign * x)).item() == sign * expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-8, 8, width=32) | st.integers(-64, 64).map(lambda n: n / 8), min_size=2, max_size=2))
def test_rounding_and_codes_are_the_librarys(pair: list[float]) -> None:
    x = torch.tensor([pair])
    theirs = FP4_E2M1_DATA.cast_to_fp4(x.clamp(-6, 6))
    assert torch.equal(round_to_float4(x), theirs)
    assert torch.equal(pack_codes(float4_codes(x)), pack_fp4_to_uint8(theirs))


def test_neighbours_of_ties_fall_to_their_own_side() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    sizes = torch.tensor(SIZES)
    assert torch.equal(round_to_float4(torch.nextafter(ties, ties * 0)), sizes[:-1])
    assert torch.equal(round_to_float4(torch.nextafter(ties, ties * 9)), sizes[1:])


def test_every_exponent_is_its_power_of_two() -> None:
    exponents = torch.arange(255, dtype=torch.uint8)
    expected = torch.tensor([2.0 ** (exponent - 127) for exponent in range(255)])
    assert torch.equal(power_of_two(exponents), expected)
    assert (power_of_two(exponents) > 0).all()


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1.5 * 2.0**127, width=32) | st.integers(-126, 126).map(lambda n: 1.75 * 2.0**n))
def test_exponents_are_the_librarys(absmax: float) -> None:
    arguments = preset_name_to_scheme("MXFP4A16", ["Linear"]).weights
    ours = power_of_two_for(torch.tensor([[absmax]]))
    theirs, _ = calculate_qparams(torch.zeros(1, 1), torch.tensor([[absmax]]), arguments)
    assert power_of_two(ours).item() == theirs.item()
    if absmax > 1e-37:
        assert 3.5 <= torch.tensor(absmax).double().item() / power_of_two(ours).double().item() < 7


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-7, 7, width=32, exclude_min=True, exclude_max=True), min_size=1, max_size=40))
def test_a_larger_power_is_never_nearer(values: list[float]) -> None:
    x = torch.tensor(values)
    error = (round_to_float4(x) - x).abs()
    assert (error <= (round_to_float4(x / 2) * 2 - x).abs()).all()
