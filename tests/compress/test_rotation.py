"""Merged rotations: another model in its weights, the same in what it says; judged by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.driver import compress, plan_compression
from powertrain.compress.hadamard import hadamard, random_hadamard, random_orthogonal
from powertrain.compress.manifest import read_manifest
from powertrain.compress.recipe import load_recipe
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("order", [1, 2, 4, 12, 16, 20, 24, 28, 36, 60, 64, 80, 112, 144, 576, 960, 1536])
def test_hadamards_rows_are_signs_at_right_angles(order: int) -> None:
    matrix = hadamard(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [0, 3, 6, 12 * 3 + 2, 7 * 8 + 4 * 9, 100])
def test_an_order_without_a_hadamard_matrix_is_refused(order: int) -> None:
    with pytest.raises(PowertrainError, match=f"of order {order} is known here.*kind: random"):
        hadamard(order)


@pytest.mark.parametrize("make", [random_hadamard, random_orthogonal])
def test_rotations_keep_lengths_and_follow_their_seed(make: Callable[..., torch.Tensor]) -> None:
    first, same, other = (make(36, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    torch.testing.assert_close(first @ first.t(), torch.eye(36, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def ids() -> torch.Tensor:
    return torch.randint(5, 320, (60,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_a_rotated_model_says_the_same(tiny_model_dir: TinyModel, tmp_path: Path, family: str, kind: str) -> None:
    import transformers

    recipe = {"steps": [{"method": "rotate", "kind": kind, "seed": 7}]}
    report = compress(tiny_model_dir(family), tmp_path / "out", recipe, dtype="float32")
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tiny_model_dir(family), tmp_path / "out")
    ]
    with torch.no_grad():
        original, rotated = (model(ids().unsqueeze(0)).logits[0] for model in models)
    assert original.std() > 0.1
    torch.testing.assert_close(rotated, original, rtol=1e-4, atol=1e-4)
    ours = load_model(open_checkpoint(tmp_path / "out"), "cpu", torch.float32).score(ids())
    torch.testing.assert_close(ours, original, rtol=1e-4, atol=1e-4)
    assert report.layers == ()
    assert "dense float32 weights" in report.summary()


def test_every_matrix_turns_and_every_norm_becomes_ones(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    compress(tiny_model_dir("qwen3"), tmp_path / "out", "rotated", dtype="float32")
    before, after = open_checkpoint(tiny_model_dir("qwen3")), open_checkpoint(tmp_path / "out")
    for name in before.names():
        if after.load(name).dim() == 2:
            assert not torch.allclose(before.load(name), after.load(name), atol=0.05), name
        elif "q_norm" in name or "k_norm" in name:
            assert torch.equal(before.load(name), after.load(name))
        else:
            assert torch.equal(after.load(name), torch.ones(before.shape(name)))
    # a Hadamard rotation of the heads' values leaves the Gram matrix of the output projection's inputs' weights
    weight = "model.layers.0.self_attn.o_proj.weight"
    assert float(after.load(weight).norm()) == pytest.approx(float(before.load(weight).norm()), rel=1e-5)


def test_one_outlying_input_channel_is_spread_over_all(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_model_dir("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][3] = 60.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    compress(source, tmp_path / "out", "rotated", dtype="float32")
    query = open_checkpoint(tmp_path / "out").load("model.layers.0.self_attn.q_proj.weight")
    folded = tensors["model.layers.0.self_attn.q_proj.weight"] * tensors["model.layers.0.input_layernorm.weight"]
    peak = [float((weight.abs().amax(1) / weight.square().mean(1).sqrt()).mean()) for weight in (folded, query)]
    assert peak[1] < 0.5 * peak[0]


def test_rounding_follows_the_rotation_and_the_manifest_says_both(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    recipe = {
        "steps": [
            {"method": "rotate", "kind": "random"},
            {"match": ["Linear", "lm_head"], "scheme": "W8A16"},
        ]
    }
    report = compress(tiny_model_dir("llama"), tmp_path / "out", recipe, dtype="float32")
    assert load_recipe(report.recipe.to_dict()) == report.recipe
    steps = read_manifest(tmp_path / "out")["recipe"]["steps"]
    assert [step["method"] for step in steps] == ["rotate", "rtn"]
    assert steps[0] == {"method": "rotate", "kind": "random", "seed": 0}
    original = load_model(open_checkpoint(tiny_model_dir("llama")), "cpu", torch.float32).score(ids())
    rounded = load_model(open_checkpoint(tmp_path / "out"), "cpu", torch.float32).score(ids())
    assert float((rounded - original).norm() / original.norm()) < 0.05


def test_the_plan_counts_the_untied_head(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    plan = plan_compression(tiny_model_dir("llama"), "rotated")
    report = compress(tiny_model_dir("llama"), tmp_path / "out", "rotated")
    source = open_checkpoint(tiny_model_dir("llama"))
    num_weights = sum(source.load(name).numel() for name in source.names())
    assert plan.num_parameters == num_weights
    assert plan.nbytes == report.nbytes == 2 * (num_weights + 320 * 64)
    assert "rotate unties lm_head" in plan.table()
    assert "20,480 weights each" in plan.table()
    assert open_checkpoint(tmp_path / "out").config["tie_word_embeddings"] is False
    assert not any("unties" in note for note in plan_compression(tiny_model_dir("qwen3"), "rotated").notes)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([{"method": "rotate", "kind": "givens"}], r"steps\[0\]\.kind is unknown: 'givens'.*hadamard, random"),
        ([{"method": "rotate", "seed": "one"}], r"steps\[0\]\.seed must be an integer"),
        ([{"method": "rotate", "match": "Linear"}], r"steps\[0\]: unknown key 'match'"),
        ([{"match": "Linear", "scheme": "W8A16"}, {"method": "rotate"}], r"steps\[1\]: rotate changes the model: put"),
        ([{"method": "rotate"}, {"match": "nothing", "scheme": "W8A16"}], r"steps\[1\]: match 'nothing' fits no layer"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tiny_model_dir: TinyModel, steps: list[object], message: str) -> None:
    with pytest.raises(PowertrainError, match=message):
        plan_compression(tiny_model_dir("llama"), {"steps": steps})


def test_a_width_without_a_hadamard_matrix_is_refused_and_random_takes_it(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=50,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=5,
        num_key_value_heads=5,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    with pytest.raises(PowertrainError, match=r"rotate: hidden_size 50: no Hadamard matrix.*kind: random"):
        plan_compression(tmp_path / "odd", "rotated")
    plan = plan_compression(tmp_path / "odd", {"steps": [{"method": "rotate", "kind": "random"}]})
    assert "rotate (random, seed 0)" in plan.table()
