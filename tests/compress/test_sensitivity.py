"""What a layer's rounding does to the model: measured as transformers would measure it, and estimated near that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.compress.sensitivity import Unit, estimated, measured, rounded
from powertrain.types import PowertrainError, QuantScheme

TinyModel = Callable[[str], Path]
CPU = torch.device("cpu")
FORMATS = tuple(QuantScheme(num_bits=bits, group_size=32) for bits in (3, 4, 6, 8))


def tokens(count: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(5, 320, (count, length), generator=torch.Generator().manual_seed(seed))


def units_of(checkpoint: Checkpoint, *, has_head: bool = False) -> list[Unit]:
    kinds = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.down_proj",))
    units = [
        Unit(tuple(f"model.layers.{index}.{name}" for name in names), FORMATS)
        for index in range(int(checkpoint.config["num_hidden_layers"]))
        for names in (*kinds, ("mlp.gate_proj", "mlp.up_proj"))
    ]
    return [*units, Unit(("lm_head",), FORMATS)] if has_head else units


@pytest.mark.parametrize(("family", "has_head"), [("llama3", True), ("qwen3", False)])
def test_measured_is_the_divergence_of_a_model_with_that_unit_rounded(
    tiny_model_dir: TinyModel, family: str, has_head: bool
) -> None:
    import transformers

    path = tiny_model_dir(family)
    checkpoint, ids = open_checkpoint(path), tokens(3, 30, 0)
    units = units_of(checkpoint, has_head=has_head)
    losses = measured(checkpoint, units, ids, device=CPU)
    assert [list(own) for own in losses] == [list(FORMATS)] * len(units)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(path).float()(ids).logits.log_softmax(-1)
        for at in (0, 3, 5, len(units) - 1):
            model = transformers.AutoModelForCausalLM.from_pretrained(path).float()
            for layer in units[at].layers:
                weight = model.get_submodule(layer).weight
                weight.copy_(rounded(weight, FORMATS[0], layer))
            found = model(ids).logits.log_softmax(-1)
            divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="sum") / ids.numel()
            assert losses[at][FORMATS[0]] == pytest.approx(float(divergence), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("family", "has_head"), [("llama3", True), ("qwen2", False)])
def test_the_estimate_is_near_what_is_measured(tiny_model_dir: TinyModel, family: str, has_head: bool) -> None:
    checkpoint, ids = open_checkpoint(tiny_model_dir(family)), tokens(96, 16, 1)
    units = units_of(checkpoint, has_head=has_head)
    found = estimated(checkpoint, units, ids, device=CPU)
    exact = measured(checkpoint, units, ids, device=CPU)
    small = FORMATS[2:]  # the expansion is of second order: it holds where little changes
    ratios = [own[scheme] / true[scheme] for own, true in zip(found, exact, strict=True) for scheme in small]
    assert min(ratios) > 0.6
    assert max(ratios) < 1.6
    assert (
        rank_correlation([own[s] for own in found for s in FORMATS], [own[s] for own in exact for s in FORMATS]) > 0.95
    )
    again = estimated(checkpoint, units, ids, device=CPU)
    assert again == found


def rank_correlation(first: list[float], second: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_progress_reaches_its_total(tiny_model_dir: TinyModel) -> None:
    checkpoint = open_checkpoint(tiny_model_dir("llama"))
    for method in (estimated, measured):
        seen: list[tuple[float, float | None]] = []
        method(
            checkpoint,
            units_of(checkpoint),
            tokens(2, 8, 0),
            device=CPU,
            progress=lambda _, done, total, seen=seen: seen.append((done, total)),
        )
        assert seen[-1][0] == seen[-1][1] == len(seen)


def test_a_damaged_block_is_named(tiny_model_dir: TinyModel) -> None:
    class Damaged:
        def __init__(self, source: Checkpoint) -> None:
            self.source = source

        def __getattr__(self, name: str) -> object:
            return getattr(self.source, name)

        def load(self, name: str) -> torch.Tensor:
            weight = self.source.load(name).clone()
            if name == "model.layers.1.mlp.down_proj.weight":
                weight[0, 0] = float("nan")
            return weight

    checkpoint = Damaged(open_checkpoint(tiny_model_dir("llama")))
    for method in (estimated, measured):
        with pytest.raises(PowertrainError, match=r"model\.layers\.1: its outputs .* are not finite"):
            method(checkpoint, units_of(checkpoint), tokens(2, 8, 0), device=CPU)
