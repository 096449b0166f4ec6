"""Width pruning: a pruned folder is the whole model with those channels and heads silenced; importances as defined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model_builders import FAMILIES
from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress import compress, load_recipe, plan_compression
from powertrain.compress.gptq import Moments
from powertrain.compress.prune_width import Width, group_importance, most_important
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
STEP = {"method": "prune_width", "intermediate_size": 64, "heads_per_group": 1, "kv_heads": 2}


def calibration() -> list[list[int]]:
    return torch.randint(5, 300, (6, 32), generator=torch.Generator().manual_seed(2)).tolist()


def transformers_model(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", [STEP, {**STEP, "heads_per_group": 2, "kv_heads": 1, "importance": "activation"}])
def test_a_pruned_folder_is_the_model_with_its_least_parts_silenced(
    tiny_model_dir: TinyModel, tmp_path: Path, family: str, step: dict[str, Any]
) -> None:
    source = tiny_model_dir(family)
    report = compress(
        source,
        tmp_path / "out",
        {"steps": [step]},
        calibration=calibration(),
        num_samples=6,
        length=32,
        dtype="float32",
    )
    silenced = transformers_model(source)
    inputs = {}
    for index, layer in enumerate(silenced.model.layers):
        for name, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj)):
            module.register_forward_pre_hook(lambda _, given, key=(index, name): inputs.__setitem__(key, given[0]))
    with torch.no_grad():
        silenced(torch.tensor(calibration()))
        for index, layer in enumerate(silenced.model.layers):
            by_contribution = step.get("importance") != "activation"
            _silence(layer.mlp.down_proj.weight, inputs[index, "down"], 1, by_contribution, lambda s: s.argsort()[:32])
            d = layer.self_attn.head_dim

            def heads_to_silence(scores: torch.Tensor) -> torch.Tensor:
                pairs = scores.view(2, 2)
                if step["kv_heads"] == 1:
                    return torch.arange(4).view(2, 2)[pairs.sum(1).argmin()]
                return torch.tensor([0, 2]) + pairs.argmin(1)

            _silence(layer.self_attn.o_proj.weight, inputs[index, "o"], d, by_contribution, heads_to_silence)
        ids = torch.tensor(calibration()[:1])
        expected = silenced(ids).logits[0]
        theirs = transformers_model(tmp_path / "out")(ids).logits[0]
    ours = load_model(open_checkpoint(tmp_path / "out"), "cpu", torch.float32).score(ids[0])
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert report.nbytes < 0.9 * report.source_nbytes


def _silence(
    weight: torch.Tensor,
    inputs: torch.Tensor,
    size: int,
    by_contribution: bool,
    least: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Zero the columns that read the least important groups of `size` inputs: the definition, in float64."""
    groups = inputs.double().flatten(0, -2).unflatten(1, (-1, size))
    columns = weight.double().unflatten(1, (-1, size))
    added = torch.einsum("tgi,ogi->tgo", groups, columns) if by_contribution else groups
    gone = least(added.square().sum(-1).mean(0))
    weight.view(len(weight), -1, size)[:, gone] = 0.0


def test_importance_is_the_mean_square_of_what_a_group_adds() -> None:
    source = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 12, generator=source), torch.randn(7, 12, generator=source)
    moments = Moments.zeros(12, torch.device("cpu"))
    moments.add(x)
    added = torch.einsum("tgi,ogi->tgo", x.double().view(50, 3, 4), weight.double().view(7, 3, 4))
    found = group_importance(moments, weight, 4, "contribution")
    torch.testing.assert_close(found, added.square().sum(-1).mean(0), rtol=1e-5, atol=0)
    found = group_importance(moments, weight, 4, "activation")
    torch.testing.assert_close(found, x.double().view(50, 3, 4).square().sum(-1).mean(0), rtol=1e-5, atol=0)


def test_every_group_keeps_its_best_heads() -> None:
    heads = torch.tensor([[5.0, 1.0, 2.0], [9.0, 9.5, 0.0], [0.1, 0.2, 0.3]])
    kept = most_important(torch.tensor([0.0, 3.0, 1.0, 2.0]), heads, Width(2, 2, 2))
    assert [part.tolist() for part in kept] == [[1, 3], [0, 2, 3, 4], [0, 1]]


def test_steps_are_checked_and_told_before_anything_is_read(tiny_model_dir: TinyModel) -> None:
    folder = tiny_model_dir("llama")
    table = plan_compression(folder, {"steps": [STEP]}).table()
    assert "intermediate_size 96 -> 64, heads_per_group 2 -> 1" in table
    recipe = load_recipe({"steps": [STEP]})
    assert load_recipe(recipe.to_dict()) == recipe
    for bad, name in (
        ({"kv_heads": 3}, "kv_heads must be 1 to 2"),
        ({}, "at least one of"),
        ({"kv_heads": 0}, "least 1"),
    ):
        with pytest.raises(PowertrainError, match=name):
            plan_compression(folder, {"steps": [{"method": "prune_width", **bad}]})
