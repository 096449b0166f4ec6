"""The range of a group: what the search may never do worse, and that it finds what a plain search would."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.compress.quantize import rtn
from powertrain.compress.ranges import CHUNK_WEIGHTS, ERROR_POWER, choose_range, to_integers
from powertrain.types import PowertrainError, QuantScheme

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def p_error(
    groups: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    num_bits: int,
    importance: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """sum |w - w'|^p of each group, float64, relative to its largest weight."""
    integers = to_integers(groups, scale, zero, num_bits).double()
    meant = (integers - (0 if zero is None else zero.double().unsqueeze(-1))) * scale.double().unsqueeze(-1)
    largest = groups.double().abs().amax(-1, keepdim=True).clamp(min=1e-300)
    return (((groups.double() - meant) / largest).abs() ** ERROR_POWER * importance).sum(-1)


@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from([(3, 2, 32), (1, 5, 64), (7, 1, 20), (4, 33)]),
    st.integers(0, 2**31),
)
@settings(max_examples=80, deadline=None)
def test_the_search_is_never_worse_than_the_whole_range(num_bits, symmetric, dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(shape, generator=generator) * 10.0 ** (seed % 4 - 2)
    groups = groups ** (1 + 2 * (seed % 2)) + (seed % 3) * 0.5
    groups[0, 0] = 0.0
    found = {
        observer: choose_range(groups, num_bits, symmetric, observer, dtype, "w") for observer in ("minmax", "mse")
    }
    errors = {observer: p_error(groups, *grid, num_bits) for observer, grid in found.items()}
    assert bool((errors["mse"] <= errors["minmax"] * (1 + 1e-4) + 1e-12).all())
    for scale, zero in found.values():
        assert scale.shape == groups.shape[:-1]
        assert torch.equal(scale, scale.to(dtype).float())
        assert bool((scale > 0).all())
        assert (zero is None) == symmetric
        if zero is not None:
            assert torch.equal(zero, zero.round())
            assert -(2 ** (num_bits - 1)) <= zero.min() <= zero.max() < 2 ** (num_bits - 1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_the_search_is_a_plain_loop_over_shares_of_the_range(num_bits, symmetric):
    groups = torch.randn(9, 2, 64, generator=torch.Generator().manual_seed(num_bits))
    best = torch.full(groups.shape[:-1], torch.inf, dtype=torch.float64)
    for percent in range(50, 101):
        low, high = (end * (percent / 100) for end in (groups.amin(-1), groups.amax(-1)))
        ends = torch.stack((low, high), dim=-1)
        scale, zero = choose_range(ends, num_bits, symmetric, "minmax", torch.float32, "w")
        best = torch.minimum(best, p_error(groups, scale, zero, num_bits))
    found = choose_range(groups, num_bits, symmetric, "mse", torch.float32, "w")
    assert torch.allclose(p_error(groups, *found, num_bits), best, rtol=1e-4)


def test_pieces_are_searched_as_the_whole():
    groups = torch.randn(2 * CHUNK_WEIGHTS // 64 + 3, 64, generator=torch.Generator().manual_seed(1))
    whole, _ = choose_range(groups, 3, True, "mse", torch.float32, "w")
    parts = [choose_range(part, 3, True, "mse", torch.float32, "w")[0] for part in groups.split(100)]
    assert torch.equal(whole, torch.cat(parts))
    wide = torch.randn(2, CHUNK_WEIGHTS + 1, generator=torch.Generator().manual_seed(2))
    assert choose_range(wide, 3, True, "mse", torch.float32, "w")[0].shape == (2,)


GAUSSIAN: list[tuple[int, int, bool, float, float]] = [
    (2, 64, False, 0.208, 0.127),
    (2, 32, False, 0.163, 0.112),
    (3, 64, False, 0.0380, 0.0312),
    (3, 64, True, 0.0485, 0.0365),
    (4, 64, False, 0.00829, 0.00763),
    (4, 64, True, 0.01056, 0.00910),
]


@pytest.mark.parametrize(("num_bits", "size", "symmetric", "plain", "searched"), GAUSSIAN)
def test_errors_of_gaussian_weights_are_those_of_rotated_real_ones(num_bits, size, symmetric, plain, searched):
    weight = torch.randn(256, 576, generator=torch.Generator().manual_seed(0))
    scheme = QuantScheme(num_bits=num_bits, group_size=size, symmetric=symmetric)
    assert rtn(weight, scheme)[1] == pytest.approx(plain, rel=0.02)
    assert rtn(weight, scheme, observer="mse")[1] == pytest.approx(searched, rel=0.02)


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_what_fits_no_grid_is_refused_by_name(observer):
    groups = torch.ones(2, 32)
    groups[1, 3] = torch.nan
    with pytest.raises(PowertrainError, match="up_proj: holds NaN or infinity"):
        choose_range(groups, 3, True, observer, torch.float32, "up_proj")
    with pytest.raises(PowertrainError, match=r"up_proj: weights are too large for torch\.float16"):
        choose_range(torch.full((1, 32), 1e6), 3, True, observer, torch.float16, "up_proj")


@pytest.mark.parametrize("symmetric", [True, False])
def test_weighted_ranges_are_those_of_a_plain_loop_with_weights(symmetric):
    generator = torch.Generator().manual_seed(5)
    groups, importance = torch.randn(7, 3, 32, generator=generator), torch.rand(3, 32, generator=generator) ** 4
    best = torch.full(groups.shape[:-1], torch.inf, dtype=torch.float64)
    for percent in range(50, 101):
        ends = torch.stack([end * (percent / 100) for end in (groups.amin(-1), groups.amax(-1))], dim=-1)
        grid = choose_range(ends, 3, symmetric, "minmax", torch.float32, "w")
        best = torch.minimum(best, p_error(groups, *grid, 3, importance))
    found = choose_range(groups, 3, symmetric, "weighted", torch.float32, "w", importance=importance)
    assert torch.allclose(p_error(groups, *found, 3, importance), best, rtol=1e-4)
    plain = choose_range(groups, 3, symmetric, "mse", torch.float32, "w")
    assert not torch.equal(found[0], plain[0])
    unweighted = choose_range(groups, 3, symmetric, "weighted", torch.float32, "w")
    assert torch.equal(unweighted[0], plain[0])
