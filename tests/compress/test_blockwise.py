"""The walk through a model, and GPTQ over whole models: judged by transformers and by the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.blockwise import CalibratedWalk, names_by_block
from powertrain.compress.calibrate import NgramFilter, calibration_set
from powertrain.compress.driver import compress
from powertrain.compress.gptq import Moments
from powertrain.compress.manifest import read_manifest
from powertrain.model.families import model_config
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]


def text(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 320, (count, length), generator=generator).tolist()


def gptq_step(**options: Any) -> dict[str, Any]:
    return {"steps": [{"match": "Linear", "method": "gptq", "scheme": "W4A16", "group_size": "channel", **options}]}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_layer_sees_what_the_compressed_ones_before_it_give(tiny_model_dir: TinyModel, family: str) -> None:
    import transformers

    path = tiny_model_dir(family)
    checkpoint, model = open_checkpoint(path), transformers.AutoModelForCausalLM.from_pretrained(path).float()
    config, ids = model_config(checkpoint.config), torch.tensor(text(3, 40, 0))
    walk = CalibratedWalk(config, checkpoint.load("model.embed_tokens.weight"), ids, keeps_original=True)
    seen: dict[str, Moments] = {}

    def rounded(name: str, weight: torch.Tensor, moments: Moments) -> torch.Tensor:
        seen[name] = moments
        return (weight * 4).round() / 4

    first, blocks, rest = names_by_block(checkpoint.names())
    assert first == ["model.embed_tokens.weight"]
    assert "model.norm.weight" in rest
    wanted = {"self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"}
    untouched = transformers.AutoModelForCausalLM.from_pretrained(path).float()
    for index, names in enumerate(blocks):
        prefix = f"model.layers.{index}."
        walk.through(index, {n.removeprefix(prefix): checkpoint.load(n).float() for n in names}, wanted, rounded)
        layer = model.model.layers[index]
        for name in sorted(wanted, key=["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"].index):
            linear, before = layer.get_submodule(name), untouched.model.layers[index].get_submodule(name)
            x, original = inputs_of(model, linear, ids), inputs_of(untouched, before, ids)
            torch.testing.assert_close(seen[name].hessian.float(), x.t() @ x, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(seen[name].shift.float(), (original - x).t() @ x, rtol=1e-3, atol=2e-3)
            linear.weight.data = (linear.weight.data * 4).round() / 4


def inputs_of(model: torch.nn.Module, linear: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What a linear layer of a transformers model multiplies, [tokens, in]."""
    found: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, given: found.append(given[0].detach()))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return found[0].flatten(0, 1)


@pytest.mark.parametrize("options", [{}, {"correction": "asymmetric"}, {"actorder": "none", "group_size": 32}])
def test_a_model_is_nearer_to_its_source_than_by_rounding_to_nearest(
    tiny_model_dir: TinyModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    path, recipe = tiny_model_dir("llama3"), gptq_step(**options)
    calibration = text(48, 64, 1)
    compress(path, tmp_path / "gptq", recipe, calibration=calibration, length=64, dtype="float32")
    plain = {"steps": [{"match": "Linear", "scheme": "W4A16", "group_size": options.get("group_size", "channel")}]}
    compress(path, tmp_path / "rtn", plain, dtype="float32")
    held_out = text(4, 64, 2)
    assert divergence(tmp_path / "gptq", path, held_out) < 0.8 * divergence(tmp_path / "rtn", path, held_out)
    manifest = read_manifest(tmp_path / "gptq")
    assert manifest["calibration"]["num_samples"] == 48
    assert len(manifest["calibration"]["sha256"]) == 64
    assert manifest["recipe"]["steps"][0]["correction"] == options.get("correction", "none")


def test_so_is_one_of_4_bit_floats(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    path, step = tiny_model_dir("llama3"), {"match": "Linear", "scheme": "MXFP4A16", "observer": "mse"}
    compress(path, tmp_path / "rtn", {"steps": [step]}, dtype="float32")
    recipe = {"steps": [{**step, "method": "gptq"}]}
    compress(path, tmp_path / "gptq", recipe, calibration=text(48, 64, 1), length=64, dtype="float32")
    held_out = text(4, 64, 2)
    assert divergence(tmp_path / "gptq", path, held_out) < 0.9 * divergence(tmp_path / "rtn", path, held_out)


def divergence(candidate: Path, reference: Path, sequences: list[list[int]]) -> float:
    models = [load_model(open_checkpoint(path), "cpu", torch.float32) for path in (reference, candidate)]
    total = 0.0
    for ids in sequences:
        ours, theirs = (model.score(torch.tensor(ids)).double().log_softmax(-1) for model in models)
        total += float((ours.exp() * (ours - theirs)).sum(-1).mean())
    return total / len(sequences)


def test_the_same_calibration_gives_the_same_bytes(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    for out in ("a", "b"):
        compress(tiny_model_dir("qwen2"), tmp_path / out, gptq_step(), calibration=text(9, 70, 3), length=32, seed=5)
    names = [file.name for file in (tmp_path / "a").glob("*.safetensors")]
    assert names
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_a_head_is_calibrated_on_the_last_norms_output(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    recipe = {"steps": [{"match": ["Linear", "lm_head"], "method": "gptq", "scheme": "W8A16"}]}
    report = compress(tiny_model_dir("llama"), tmp_path / "out", recipe, calibration=text(9, 40, 3), length=40)
    assert report.layers[-1].name == "lm_head"
    assert report.layers[-1].method == "gptq"
    assert divergence(tmp_path / "out", tiny_model_dir("llama"), text(2, 40, 8)) < 0.01


def test_gptq_without_text_is_refused_before_anything_is_written(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(PowertrainError, match="gptq needs calibration text: give --calibration"):
        compress(tiny_model_dir("llama"), tmp_path / "out", gptq_step())
    assert not (tmp_path / "out").exists()


def test_calibration_windows(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model_dir("llama"))
    file = tmp_path / "text.txt"
    file.write_text("the river and the barn and the engine " * 60)
    made = calibration_set([file, file], checkpoint, num_samples=6, length=24, seed=1)
    assert made.token_ids.shape == (6, 24)
    assert made.source == "text.txt, text.txt"
    assert made.sha256 == calibration_set([file, file], checkpoint, num_samples=6, length=24, seed=1).sha256
    assert made.sha256 != calibration_set([file, file], checkpoint, num_samples=6, length=24, seed=2).sha256
    with pytest.raises(PowertrainError, match="no text of 500 tokens"):
        calibration_set([[5] * 20], checkpoint, length=500)
    with pytest.raises(PowertrainError, match=r"must be in 0\.\.319"):
        calibration_set([[900] * 20], checkpoint, length=20)
    with pytest.raises(PowertrainError, match="samples of 2 to 512 tokens"):
        calibration_set([[5] * 20], checkpoint, length=4000)


def test_shared_runs_of_thirteen_tokens_are_found() -> None:
    known, other = text(3, 100, 0), text(3, 100, 1)
    ngrams = NgramFilter(known)
    assert ngrams.num_shared(other) == 0
    assert ngrams.num_shared([other[0][:40] + known[1][20:35] + other[1][:40]]) == 3
    assert ngrams.num_shared([known[1][20:32]]) == 0
