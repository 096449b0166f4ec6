"""Signed-gradient rounding over whole models: a block sees the compressed ones before it, and the model is nearer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.blockwise import CalibratedWalk
from powertrain.compress.driver import compress, plan_compression
from powertrain.compress.manifest import read_manifest
from powertrain.compress.recipe import load_recipe
from powertrain.model.families import model_config
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]


def text(count: int, length: int, seed: int) -> list[list[int]]:
    return torch.randint(5, 320, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def recipe(**options: Any) -> dict[str, Any]:
    entries = {"match": "Linear", "method": "autoround", "scheme": "W4A16", "group_size": "channel", "iterations": 80}
    return {"steps": [{**entries, **options}]}


def test_a_block_is_shown_what_it_gets_and_what_it_should_give(tiny_model_dir: TinyModel) -> None:
    import transformers

    path, ids = tiny_model_dir("qwen3"), torch.tensor(text(3, 40, 0))
    checkpoint, changed = open_checkpoint(path), transformers.AutoModelForCausalLM.from_pretrained(path).float()
    config = model_config(checkpoint.config)
    walk = CalibratedWalk(config, checkpoint.load("model.embed_tokens.weight"), ids, keeps_original=True)
    within = [
        {n.removeprefix(prefix): checkpoint.load(n).float() for n in checkpoint.names() if n.startswith(prefix)}
        for prefix in ("model.layers.0.", "model.layers.1.")
    ]
    rounded = {"mlp.up_proj.weight": (within[0]["mlp.up_proj.weight"] * 4).round() / 4}
    walk.through(0, within[0], set(), lambda name, weight, moments: weight, rounded)
    with torch.no_grad():
        original = changed.model(ids, output_hidden_states=True).hidden_states
        outputs: list[torch.Tensor] = []
        # before the final norm, which the last of the hidden states has passed
        changed.model.layers[1].register_forward_hook(lambda _, __, out: outputs.append(out))
        changed(ids)
        changed.model.layers[0].mlp.up_proj.weight.copy_(rounded["mlp.up_proj.weight"])
        current = changed.model(ids, output_hidden_states=True).hidden_states
    assert not torch.allclose(original[1], current[1], atol=1e-2)
    for is_original, wanted in ((True, outputs[0]), (False, outputs[1])):
        inputs, targets = walk.examples(1, within[1], is_original=is_original)
        torch.testing.assert_close(inputs, current[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(targets, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("target", ["original", "compressed"])
def test_a_model_is_nearer_to_its_source_than_by_rounding_to_nearest(
    tiny_model_dir: TinyModel, tmp_path: Path, target: str
) -> None:
    path, calibration = tiny_model_dir("llama3"), text(64, 64, 1)
    compress(path, tmp_path / "learned", recipe(target=target), calibration=calibration, length=64, dtype="float32")
    plain = {"steps": [{"match": "Linear", "scheme": "W4A16", "group_size": "channel", "observer": "mse"}]}
    compress(path, tmp_path / "plain", plain, dtype="float32")
    held_out = text(4, 64, 2)
    assert divergence(tmp_path / "learned", path, held_out) < 0.93 * divergence(tmp_path / "plain", path, held_out)
    step = read_manifest(tmp_path / "learned")["recipe"]["steps"][0]
    assert step["target"] == target
    assert step["iterations"] == 80
    assert step["learning_rate"] == "auto"


def divergence(candidate: Path, reference: Path, sequences: list[list[int]]) -> float:
    models = [load_model(open_checkpoint(path), "cpu", torch.float32) for path in (reference, candidate)]
    total = 0.0
    for ids in sequences:
        ours, theirs = (model.score(torch.tensor(ids)).double().log_softmax(-1) for model in models)
        total += float((ours.exp() * (ours - theirs)).sum(-1).mean())
    return total / len(sequences)


def test_methods_share_a_block_and_the_seed_decides(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    """Formats of one method are rounded together; the rest then sees what they have become."""
    learned = {"method": "autoround", "iterations": 5, "batch_size": 2}
    mixed = {
        "steps": [
            {"match": "re:.*(q|k|v)_proj", "scheme": "W4A16_ASYM", "group_size": 32, **learned},
            {"match": "re:.*(gate|up)_proj", "scheme": "W2A16", "group_size": 32, **learned},
            {"match": "re:.*down_proj", "method": "gptq", "scheme": "W4A16", "group_size": 32},
            {"match": "re:.*o_proj", "scheme": "W8A16"},
        ]
    }
    seeds = {"a": 5, "b": 5, "c": 6}
    for out, seed in seeds.items():
        report = compress(
            tiny_model_dir("qwen2"), tmp_path / out, mixed, calibration=text(8, 32, 3), length=32, seed=seed
        )
    assert {layer.method for layer in report.layers} == {"autoround", "gptq", "rtn"}
    assert len(report.layers) == len(plan_compression(tiny_model_dir("qwen2"), mixed).layers)
    stored = {out: [(f.name, f.read_bytes()) for f in sorted((tmp_path / out).glob("*.safetensors"))] for out in seeds}
    assert stored["a"] == stored["b"] != stored["c"]


def test_the_entries_are_checked_and_come_back(tiny_model_dir: TinyModel) -> None:
    made = load_recipe(recipe(learning_rate=0.01, target="compressed", autocast=True, batch_size=4))
    assert load_recipe(made.to_dict()) == made
    assert made.steps[0].autoround.learning_rate == 0.01
    for entries, message in (
        ({"iterations": -1}, r"steps\[0\].iterations must be"),
        ({"batch_size": 0}, r"steps\[0\].batch_size must be"),
        ({"learning_rate": 0}, r"steps\[0\].learning_rate must be"),
        ({"target": "none"}, r"steps\[0\].target is unknown"),
        ({"autocast": 1}, r"steps\[0\].autocast must be"),
        ({"actorder": "none"}, "unknown key 'actorder'"),
        ({"scheme": "FP8_DYNAMIC"}, "FP8_DYNAMIC"),
    ):
        with pytest.raises(PowertrainError, match=message):
            load_recipe(recipe(**entries))
    with pytest.raises(PowertrainError, match="lm_head: autoround rounds the matrices of a block together"):
        plan_compression(tiny_model_dir("llama3"), recipe(match=["Linear", "lm_head"]))
    with pytest.raises(PowertrainError, match="autoround needs calibration text"):
        compress(tiny_model_dir("llama3"), "unused", recipe())
