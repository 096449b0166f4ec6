"""The plain decoder gives what the engine's decoder gives, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model_builders import FAMILIES
from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.plain_decoder import PlainBlock
from powertrain.model.families import model_config


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_decoders(tiny_model_dir: Callable[[str], Path], family: str) -> None:
    checkpoint = open_checkpoint(tiny_model_dir(family))
    config = model_config(checkpoint.config)
    ids = torch.randint(5, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    x = checkpoint.load("model.embed_tokens.weight").float()[ids]
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        names = [name for name in checkpoint.names() if name.startswith(prefix)]
        x = PlainBlock(config, index, {n.removeprefix(prefix): checkpoint.load(n).float() for n in names})(x)
    norm = PlainBlock(config, 0, {"norm.weight": checkpoint.load("model.norm.weight").float()})
    head = "model.embed_tokens.weight" if config.ties_embeddings else "lm_head.weight"
    logits = norm.normed(x, "norm") @ checkpoint.load(head).float().t()
    model = load_model(checkpoint, "cpu", torch.float32)
    for row, own in zip(ids, logits, strict=True):
        torch.testing.assert_close(own, model.score(row), rtol=1e-4, atol=1e-4)


def test_gradients_pass(tiny_model_dir: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(tiny_model_dir("qwen3"))
    prefix = "model.layers.0."
    names = [name for name in checkpoint.names() if name.startswith(prefix)]
    weights = {n.removeprefix(prefix): checkpoint.load(n).float().requires_grad_() for n in names}
    block = PlainBlock(model_config(checkpoint.config), 0, weights)
    block(torch.randn(1, 9, block.config.hidden_size)).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in weights.values())
