"""Integers moved into GGUF's blocks: what the `gguf` package decodes is what they stood for, to the last bit."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.gguf_integers import encode_integers, half_error, type_of_integers
from powertrain.model.weights import IntWeight


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_bits=st.integers(2, 8),
    group=st.sampled_from([32, 64, 192]),
    is_symmetric=st.booleans(),
)
def test_integers_keep_their_values(seed: int, num_bits: int, group: int, is_symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    high = 1 << (num_bits - 1)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-high, high, shape, generator=generator, dtype=torch.int8)

    # powers of two, whose multiples by a code are float16 numbers too
    scale = 2.0 ** torch.randint(-9, -4, (5, 192 // group), generator=generator).float()
    weight = IntWeight(integers(5, 192), scale, None if is_symmetric else integers(5, 192 // group), num_bits)
    name = type_of_integers(weight)
    if not is_symmetric and num_bits > 5:
        assert name is None
        return
    assert (
        name
        == {True: {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}, False: {4: "Q4_1", 5: "Q5_1"}}[is_symmetric][
            next(bits for bits in (4, 5, 8) if num_bits <= bits)
        ]
    )
    assert half_error(weight) == 0
    decoded = gguf.quants.dequantize(encode_integers(name, weight), gguf.GGMLQuantizationType[name])
    assert np.array_equal(decoded, weight.dequantize().numpy())


def test_minima_beyond_float16s_digits_are_said_to_be_rounded() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).repeat(2).view(1, 32)
    scale = torch.tensor([[255 * 2.0**-14]]).bfloat16()  # times 13 it has twelve digits of two
    weight = IntWeight(values, scale, torch.tensor([[5]], dtype=torch.int8), 4)
    assert type_of_integers(weight) == "Q4_1"
    assert 0 < half_error(weight) <= 2**-11
    decoded = gguf.quants.dequantize(encode_integers("Q4_1", weight), gguf.GGMLQuantizationType.Q4_1)
    minimum = float(scale) * 13
    assert np.allclose(decoded, weight.dequantize().numpy(), rtol=0, atol=minimum * 2**-11)


def test_what_has_no_blocks_is_told() -> None:
    values = torch.ones(1, 32, dtype=torch.int8)

    def with_scale(number: float) -> IntWeight:
        return IntWeight(values, torch.tensor([[number]]), None, 4)

    assert type_of_integers(with_scale(1e-7 / 3)) is None
    assert type_of_integers(with_scale(1e6)) is None
    assert type_of_integers(with_scale(float("nan"))) is None
    assert type_of_integers(with_scale(1 / 3)) == "Q4_0"
    assert 0 < half_error(with_scale(1 / 3)) <= 2**-11
    assert type_of_integers(with_scale(0.5)._replace(input_order=torch.arange(32))) is None
    assert type_of_integers(IntWeight(values, torch.ones(1, 2), None, 4)) is None  # groups of 16
