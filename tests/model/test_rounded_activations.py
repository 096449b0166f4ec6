"""Layers that hand activations on rounded give what the reference's own rounding gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.kernels.op import choosing
from powertrain.kernels.quantized import MAX_UNROUNDED_ROWS
from powertrain.kernels.rounding import quantize_to_float8
from powertrain.model.decoder import Decoder
from powertrain.model.float8 import Float8, Float8Weight


class OnAGPU(Float8):
    """As it would be there, on a CPU."""

    num_rounded = 0

    def rounded_dtype(self) -> torch.dtype | None:
        return torch.float8_e4m3fn

    def matmul_rounded(self, x, keeps_pieces=False):  # type: ignore[no-untyped-def]
        type(self).num_rounded += 1
        return super().matmul_rounded(x, keeps_pieces)

    def gated_rounded(self, x, to):  # type: ignore[no-untyped-def]
        type(self).num_rounded += 1
        return super().gated_rounded(x, to)


def model_of(folder: Path, kind: type[Float8]) -> Decoder:
    model = load_model(open_checkpoint(folder), "cpu", torch.float32)
    for block in model.blocks:
        for linear in block.linears():
            values, scale = quantize_to_float8(linear.formats[0].unpack())
            linear.formats = [kind.pack(Float8Weight(values, scale[:, 0]), model.device, rounds_input=True)]
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_norms_and_gates_hand_on_what_products_would_round(
    tiny_model_dir: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_dir(family)
    ids = torch.randint(0, 320, (38,), generator=torch.Generator().manual_seed(0))
    expected = model_of(folder, Float8).score(ids)
    monkeypatch.setattr(OnAGPU, "num_rounded", 0)
    model = model_of(folder, OnAGPU)
    torch.testing.assert_close(model.score(ids), expected, rtol=1e-4, atol=1e-4)
    # down and gate-up of every layer; qkv of all but the first, whose norm has nothing to add
    assert OnAGPU.num_rounded == 3 * len(model.blocks) - 1
    monkeypatch.setattr(OnAGPU, "num_rounded", 0)
    with choosing("invariant"):
        model.score(ids)
    model.score(ids[: MAX_UNROUNDED_ROWS[torch.float8_e4m3fn]])
    assert OnAGPU.num_rounded == 0
