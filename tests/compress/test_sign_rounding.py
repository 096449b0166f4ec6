"""Signed-gradient rounding of one block: its output is nearer than by rounding to nearest, and the integers are it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.plain_decoder import LINEARS_OF_STEP, PlainBlock
from powertrain.compress.quantize import rtn
from powertrain.compress.ranges import Observer
from powertrain.compress.sign_rounding import RoundedBlock, SignRoundingOptions, TrainableRounding, round_block
from powertrain.model.families import ModelConfig, model_config
from powertrain.types import PowertrainError, QuantScheme

LINEARS = [name for names in LINEARS_OF_STEP.values() for name in names]
Block = tuple[ModelConfig, dict[str, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def block(tiny_model_dir: Callable[[str], Path]) -> Block:
    """A random block and correlated inputs [60, 20, hidden], with a few large directions as activations have."""
    checkpoint = open_checkpoint(tiny_model_dir("llama3"))
    config, prefix = model_config(checkpoint.config), "model.layers.0."
    names = [name for name in checkpoint.names() if name.startswith(prefix)]
    weights = {name.removeprefix(prefix): checkpoint.load(name).float() for name in names}
    generator, width = torch.Generator().manual_seed(0), config.hidden_size
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width).unsqueeze(1)
    return config, weights, torch.randn(60, 20, width, generator=generator) @ mix


def rounded(block: Block, scheme: QuantScheme, options: SignRoundingOptions, target: int = 48) -> RoundedBlock:
    """The block rounded on the first `target` sequences."""
    config, weights, x = block
    targets = PlainBlock(config, 0, weights)(x[:target])
    return round_block(config, 0, weights, dict.fromkeys(LINEARS, scheme), x[:target], targets, options)


def error_of(block: Block, matrices: dict[str, torch.Tensor], rows: slice) -> float:
    config, weights, x = block
    changed = {**weights, **{f"{name}.weight": matrix for name, matrix in matrices.items()}}
    difference = PlainBlock(config, 0, changed)(x[rows]) - PlainBlock(config, 0, weights)(x[rows])
    return float(difference.square().mean())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("num_bits", "group_size", "share"), [(2, 32, 0.7), (4, None, 0.7), (8, 32, 0.8)])
def test_the_output_is_much_nearer_than_by_rounding_to_nearest(
    block: Block, num_bits: int, group_size: int | None, symmetric: bool, share: float
) -> None:
    scheme = QuantScheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric)
    found = rounded(block, scheme, SignRoundingOptions(iterations=50))
    plain = {name: rtn(block[1][f"{name}.weight"], scheme, observer="mse")[0].dequantize() for name in LINEARS}
    matrices = {name: matrix.dequantize() for name, matrix in found.matrices.items()}
    assert error_of(block, matrices, slice(48, 60)) < share * error_of(block, plain, slice(48, 60))
    # what it says of itself is what its integers decode to
    assert found.error == pytest.approx(error_of(block, matrices, slice(0, 48)), rel=1e-3)
    assert found.first_error == pytest.approx(error_of(block, plain, slice(0, 48)), rel=1e-3)
    limit = 2 ** (num_bits - 1)
    for name, matrix in found.matrices.items():
        assert -limit <= int(matrix.values.min()), name
        assert int(matrix.values.max()) < limit, name
        assert (matrix.zero_point is None) == symmetric


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_steps_it_is_rounding_to_nearest(
    block: Block, symmetric: bool, observer: Observer, scale_dtype: torch.dtype
) -> None:
    config, weights, x = block
    scheme = QuantScheme(num_bits=3, group_size=32, symmetric=symmetric)
    options = SignRoundingOptions(iterations=0, observer=observer)
    schemes = {"self_attn.q_proj": scheme, "mlp.down_proj": QuantScheme(num_bits=8, symmetric=symmetric)}
    found = round_block(config, 0, weights, schemes, x, x, options, scale_dtype=scale_dtype)
    assert list(found.matrices) == list(schemes)
    for name, matrix in found.matrices.items():
        plain, _ = rtn(weights[f"{name}.weight"], schemes[name], scale_dtype=scale_dtype, observer=observer)
        assert torch.equal(matrix.values, plain.values)
        assert torch.equal(matrix.scale, plain.scale)
        assert matrix.scale.dtype == scale_dtype
        assert symmetric or torch.equal(matrix.zero_point, plain.zero_point)


def test_the_seed_decides(block: Block) -> None:
    scheme, options = QuantScheme(num_bits=3, group_size=32), SignRoundingOptions(iterations=25, batch_size=6, seed=3)
    first, again = (rounded(block, scheme, options).matrices for _ in range(2))
    other = rounded(block, scheme, replace(options, seed=4)).matrices
    assert all(torch.equal(first[name].values, again[name].values) for name in first)
    assert not all(torch.equal(first[name].values, other[name].values) for name in first)


def test_a_step_too_long_leaves_rounding_to_nearest(block: Block) -> None:
    scheme = QuantScheme(num_bits=8, group_size=None)
    found = rounded(block, scheme, SignRoundingOptions(iterations=3, learning_rate=10.0))
    assert found.error == found.first_error
    plain = rtn(block[1]["mlp.up_proj.weight"], scheme, observer="mse")[0]
    assert torch.equal(found.matrices["mlp.up_proj"].values, plain.values)


def test_it_works_on_what_inference_mode_made(block: Block) -> None:
    config, weights, x = block
    with torch.inference_mode():
        made = {name: tensor * 1.0 for name, tensor in weights.items()}
        inputs = x * 1.0
        targets = PlainBlock(config, 0, made)(inputs)
        schemes = {"mlp.up_proj": QuantScheme(num_bits=3, group_size=32)}
        found = round_block(config, 0, made, schemes, inputs, targets, SignRoundingOptions(iterations=10))
    assert found.error < found.first_error


def test_the_gradient_of_a_range_is_that_of_rounding_held_fixed() -> None:
    """d/ds of s (round(w/s) - z): the integer where the end of the grid cuts it, else the rounding error in steps."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    options = SignRoundingOptions()
    rounding = TrainableRounding(weight, QuantScheme(num_bits=2, group_size=32), options, torch.float32, "w")
    seed = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))
    (rounding.weight() * seed).sum().backward()
    scale, _ = rounding.grid()
    position = weight.view(4, 2, 32) / scale.detach().unsqueeze(-1)
    values = position.round().clamp(-2, 1)
    inside = (position.round() >= -2) & (position.round() <= 1)
    expected = ((values - torch.where(inside, position, 0.0)) * seed.view(4, 2, 32)).sum(-1) * scale.detach()
    torch.testing.assert_close(rounding._factors[0].grad, expected)


def test_what_cannot_be_is_refused_by_name(block: Block) -> None:
    config, weights, x = block
    scheme = {"mlp.up_proj": QuantScheme(num_bits=4, group_size=32)}
    with pytest.raises(PowertrainError, match=r"model\.layers\.0: .*needs calibration text"):
        round_block(config, 0, weights, scheme, x[:0], x[:0])
    broken = x.clone()
    broken[0, 0, 0] = float("nan")
    with pytest.raises(PowertrainError, match=r"model\.layers\.0: its activations .* not finite"):
        round_block(config, 0, weights, scheme, broken, x)
    odd = {"mlp.up_proj": QuantScheme(num_bits=4, group_size=48)}
    with pytest.raises(PowertrainError, match=r"model\.layers\.0\.mlp\.up_proj: group_size 48"):
        round_block(config, 0, weights, odd, x, x)
