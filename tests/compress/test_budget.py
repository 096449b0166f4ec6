"""Bits by a budget: the recipe costs what was promised, keeps to its target, and beats one format for all."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from powertrain import cli
from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.budget import Budget, Target, budget
from powertrain.compress.driver import compress, plan_compression
from powertrain.compress.plain_decoder import LINEARS_OF_STEP
from powertrain.compress.recipe import load_recipe
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
FORMATS = ("W2A16:32", "W3A16:32", "W4A16:32", "W5A16:32", "W6A16:32", "W8A16:channel")


def text(count: int, length: int, seed: int) -> list[list[int]]:
    return torch.randint(5, 320, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def found(path: Path, **target: float) -> Budget:
    return budget(path, Target(**target), calibration=text(48, 24, 1), formats=FORMATS, length=24)


@pytest.fixture(scope="module")
def uneven(tiny_model_dir: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which some layers matter and some hardly do, as in real ones."""
    from powertrain.checkpoint.safetensors_folder import write_checkpoint
    from powertrain.checkpoint.tokenizer_files import hugging_face_files

    source = open_checkpoint(tiny_model_dir("llama3"))
    small = ("layers.0.self_attn.o_proj", "layers.1.mlp.down_proj")

    def tensors():
        for name in source.names():
            yield name, source.load(name) * (0.1 if any(part in name for part in small) else 1.0)

    out = tmp_path_factory.mktemp("uneven") / "model"
    write_checkpoint(out, source.config, tensors(), hugging_face_files(source.path))
    return out


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_the_recipe_costs_what_was_promised_and_keeps_to_its_target(tiny_model_dir: TinyModel, family: str) -> None:
    path = tiny_model_dir(family)
    least, most = None, None
    for bits in (8.0, 9.0, 10.5) if family == "llama3" else (10.0, 11.0, 12.5):
        one = found(path, bits=bits)
        plan = plan_compression(path, one.recipe)
        assert plan.nbytes == one.chosen.nbytes
        assert plan.bits_per_weight == pytest.approx(one.chosen.bits_per_weight)
        assert bits - 0.5 < one.chosen.bits_per_weight <= bits
        assert most is None or one.chosen.kl < most
        least, most = least or one, one.chosen.kl
    assert least is not None
    by_kl = found(path, kl=least.chosen.kl)
    assert by_kl.chosen == least.chosen
    assert found(path, nbytes=least.chosen.nbytes).recipe == least.recipe


def test_layers_that_share_an_input_share_a_format(uneven: Path) -> None:
    recipe = found(uneven, bits=9.0).recipe
    step_of = recipe.assign([layer for step in recipe.steps for layer in step.match])
    for index in range(2):
        for together in LINEARS_OF_STEP.values():
            assert len({id(step_of.get(f"model.layers.{index}.{name}")) for name in together}) == 1


def test_the_frontier_is_monotone_and_in_the_table(uneven: Path) -> None:
    one = found(uneven, bits=9.0)
    marks = one.frontier
    assert len(marks) > 5
    assert all(a.nbytes < b.nbytes and a.kl > b.kl for a, b in itertools.pairwise(marks))
    assert f"* {one.chosen.bits_per_weight:6.3f}" in one.table()
    assert set(one.chosen.bits_of_kind) == {"k/q/v", "o", "gate/up", "down", "lm_head"}


@pytest.mark.parametrize("sensitivity", ["fisher", "kl"])
def test_it_beats_one_format_for_all_at_its_size(uneven: Path, tmp_path: Path, sensitivity: str) -> None:
    same = {"steps": [{"match": ["Linear", "lm_head"], "scheme": "W4A16", "group_size": 32, "observer": "mse"}]}
    uniform = compress(uneven, tmp_path / "uniform", same)
    calibration = text(48, 24, 1)
    one = budget(
        uneven,
        Target(nbytes=uniform.nbytes),
        calibration=calibration,
        formats=FORMATS,
        length=24,
        sensitivity=sensitivity,
    )
    mixed = compress(uneven, tmp_path / "mixed", one.recipe)
    assert mixed.nbytes <= uniform.nbytes
    held_out = text(6, 64, 2)
    assert divergence(tmp_path / "mixed", uneven, held_out) < 0.85 * divergence(tmp_path / "uniform", uneven, held_out)


def divergence(candidate: Path, reference: Path, sequences: list[list[int]]) -> float:
    models = [load_model(open_checkpoint(path), "cpu", torch.float32) for path in (reference, candidate)]
    total = 0.0
    for ids in sequences:
        ours, theirs = (model.score(torch.tensor(ids)).double().log_softmax(-1) for model in models)
        total += float((ours.exp() * (ours - theirs)).sum(-1).mean())
    return total / len(sequences)


def test_a_target_out_of_reach_says_what_is_in_reach(tiny_model_dir: TinyModel) -> None:
    path = tiny_model_dir("llama3")
    with pytest.raises(PowertrainError, match=r"1,000 bytes are too few: .* take [\d,]+ at least"):
        found(path, nbytes=1000)
    with pytest.raises(PowertrainError, match="leaves every layer dense"):
        found(path, bits=32.0)
    for wrong in ({}, {"bits": 4.0, "kl": 0.1}, {"kl": 0.0}, {"bits": float("nan")}):
        with pytest.raises(PowertrainError, match="one target above zero"):
            Target(**wrong)


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (["W4A16"], "give SCHEME:GROUP_SIZE"),
        (["W9A16:64"], "W9A16"),
        (["W8A8:channel"], "integer formats of weights alone"),
        (["W4A16:128"], "none of the formats' group sizes divides the rows"),
        ([], "at least one format"),
    ],
)
def test_formats_that_cannot_be_are_refused(tiny_model_dir: TinyModel, formats: list[str], message: str) -> None:
    with pytest.raises(PowertrainError, match=message):
        budget(tiny_model_dir("llama"), Target(bits=9.0), calibration=text(4, 24, 1), formats=formats, length=24)


def test_the_verb_writes_a_recipe_that_compress_takes(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    path, recipe, record, words = tiny_model_dir("llama"), *(tmp_path / n for n in ("r.yaml", "r.json", "words.txt"))
    words.write_text("The engine pulled the carts up the hill, and the sun went down. " * 40)
    options = ["--calibration", str(words), "--calibration-length", "16", "--formats", ",".join(FORMATS)]
    arguments = ["budget", str(path), "--out", str(recipe), "--target-bits", "9.5", "--json", str(record), *options]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "KL predicted" in result.stdout
    made = json.loads(record.read_text())
    report = compress(path, tmp_path / "out", str(recipe))
    assert report.nbytes == made["chosen"]["nbytes"]
    assert load_recipe(recipe).to_dict() == made["recipe"]
    assert 9.0 < report.bits_per_weight <= 9.5
