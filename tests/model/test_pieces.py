"""A decoder whose products come in pieces gives the logits of one whose products are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.model.weights import WeightFormat


class Split:
    """Any format, its product left in three pieces."""

    def __init__(self, inner: WeightFormat) -> None:
        self.inner, self.name, self.out_features = inner, inner.name, inner.out_features
        self.step_bytes, self.nbytes, self.unpack = inner.step_bytes, inner.nbytes, inner.unpack
        self.num_calls = 0

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.matmul(x)

    def matmul_in_pieces(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        whole = self.inner.matmul(x)
        return torch.stack((whole * 0.5, whole * 0.25, whole * 0.25))


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2"])
def test_pieces_are_summed_where_they_are_added(tiny_model_dir: Callable[[str], Path], family: str) -> None:
    model = load_model(open_checkpoint(tiny_model_dir(family)), "cpu", torch.float32)
    ids = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(0))
    expected = model.score(ids)
    split = []
    for block in model.blocks:
        for linear in (block.attention.output, block.mlp.down):
            linear.formats = [Split(linear.formats[0])]
            split += linear.formats
    torch.testing.assert_close(model.score(ids), expected, rtol=1e-5, atol=1e-5)
    assert all(isinstance(one, Split) and one.num_calls == 1 for one in split)
