"""The leak detector: grids it must find, real weights it must leave alone."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.leak import Grid, describe_leaks, find_grid
from powertrain.compress.quantize import rtn
from powertrain.types import QuantScheme


def random_weight(out_features: int = 64, in_features: int = 768, seed: int = 0) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [64, 576, 1536, 100])
def test_real_weights_are_on_no_grid(dtype: torch.dtype, in_features: int):
    for seed in range(4):
        assert find_grid(random_weight(64, in_features, seed).to(dtype)) is None
        assert find_grid((random_weight(64, in_features, seed) ** 3).to(dtype)) is None  # heavy tails


@pytest.mark.parametrize(
    ("kind", "grid"),
    [
        (gguf.GGMLQuantizationType.Q4_0, Grid(32, 4)),
        (gguf.GGMLQuantizationType.Q4_1, Grid(32, 4)),
        (gguf.GGMLQuantizationType.Q5_0, Grid(32, 5)),
        (gguf.GGMLQuantizationType.Q5_1, Grid(32, 5)),
        (gguf.GGMLQuantizationType.Q8_0, Grid(32, 8)),
    ],
)
def test_blocks_of_gguf_files_are_found(kind, grid: Grid):
    packed = gguf.quants.quantize(random_weight().numpy(), kind)
    weight = torch.from_numpy(np.asarray(gguf.quants.dequantize(packed, kind), dtype=np.float32))
    assert find_grid(weight) == grid


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_our_own_rounding_is_found(num_bits: int, group_size: int, symmetric: bool):
    scheme = QuantScheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric)
    weight = rtn(random_weight(), scheme, scale_dtype=torch.float16)[0].dequantize()
    found = find_grid(weight)
    assert found is not None
    assert found.group_size == group_size
    assert found.num_bits <= num_bits
    assert find_grid(weight.half()) == found  # stored in half precision it is still the same source


def test_what_cannot_lie_on_a_grid_is_passed_over():
    assert find_grid(torch.zeros(8, 64)) is None
    assert find_grid(torch.ones(64)) is None
    assert find_grid(torch.full((8, 64), float("nan"))) is None
    assert find_grid(torch.ones(8, 64, dtype=torch.int32)) is None


def test_one_warning_per_grid_with_counts():
    grids = [("a", Grid(32, 4)), ("b", Grid(32, 4)), ("c", None), ("d", Grid(32, 8))]
    first, second = describe_leaks(grids)
    assert first.startswith("source is already quantized: 2 of 4 matrices (e.g. a) lie on a grid of 4 bits")
    assert "not a loss measurement" in first
    assert "1 of 4 matrices (e.g. d) lie on a grid of 8 bits in groups of 32" in second
    assert describe_leaks([("a", None)]) == []


def test_a_trained_model_is_on_no_grid(stories260k_dir: Path):
    checkpoint = open_checkpoint(stories260k_dir)
    assert [name for name in checkpoint.names() if find_grid(checkpoint.load(name)) is not None] == []


def test_the_default_models_grid_is_found(smollm2_gguf: Path):
    checkpoint = open_checkpoint(smollm2_gguf)
    names = [name for name in checkpoint.names() if name.endswith("_proj.weight") and ".7." in name]
    assert {find_grid(checkpoint.load(name)) for name in names} == {Grid(32, 4)}
    assert len(names) == 7
    assert find_grid(checkpoint.load("model.embed_tokens.weight")) == Grid(32, 8)
