"""Depth pruning: influence against its formula, and pruned folders against models pruned by hand, in two engines."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import iterate, open_checkpoint
from powertrain.compress import compress, load_recipe, plan_compression
from powertrain.compress.blockwise import block_of
from powertrain.compress.manifest import read_manifest
from powertrain.compress.plain_model import load_plain_model
from powertrain.compress.prune_depth import (
    PruneDepthStep,
    block_influence,
    depth_pruned,
    greedy_kept,
    most_influential,
    pruned_config,
    spread,
    without,
)
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]


def ids(rows: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(5, 300, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_influence_is_one_minus_the_mean_cosine_of_transformers_hidden_states(
    tiny_model_dir: TinyModel, family: str
) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir(family)).double().eval()
    captured: list[torch.Tensor] = []
    for layer in model.model.layers:  # hidden_states of the last layer come normed: read the layers' own ends
        layer.register_forward_pre_hook(lambda _, given: captured.append(given[0]))
        layer.register_forward_hook(lambda _, given, out: captured.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids())
    pairs = zip(captured[::2], captured[1::2], strict=True)
    expected = [1 - float(torch.cosine_similarity(before, after, dim=-1).mean()) for before, after in pairs]
    found = block_influence(open_checkpoint(tiny_model_dir(family)), ids())
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("family", "kept"), [("mistral", (0, 2)), ("qwen3", (1,)), ("llama", (0,))])
def test_a_written_pruned_folder_is_the_model_without_those_blocks(
    tiny_model_dir: TinyModel, tmp_path: Path, family: str, kept: tuple[int, ...]
) -> None:
    import transformers

    source = open_checkpoint(tiny_model_dir(family))
    pruned = depth_pruned(source, kept)
    write_checkpoint(tmp_path / "out", pruned.config, iterate(pruned))
    by_hand = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir(family)).eval()
    layers = by_hand.model.layers
    by_hand.model.layers = torch.nn.ModuleList([layers[index] for index in kept])
    for index, layer in enumerate(by_hand.model.layers):
        layer.self_attn.layer_idx = index
    by_hand.config.num_hidden_layers = len(kept)
    token_ids = ids(1)
    with torch.no_grad():
        expected = by_hand(token_ids, use_cache=False).logits[0]
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(token_ids).logits[0]
    ours = load_model(open_checkpoint(tmp_path / "out"), "cpu", torch.float32).score(token_ids[0])
    assert torch.equal(theirs, expected)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_lists_of_one_entry_per_layer_are_cut_with_the_layers() -> None:
    config = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "max_window_layers": 3, "hidden_size": 8}
    assert pruned_config(config, [0, 2, 3]) == {
        "num_hidden_layers": 3,
        "layer_types": ["a", "c", "d"],
        "max_window_layers": 2,
        "hidden_size": 8,
    }


@given(st.lists(st.floats(0, 2), min_size=1, max_size=12), st.data())
def test_no_dropped_block_has_more_influence_than_a_kept_one(influences: list[float], data: st.DataObject) -> None:
    kept = most_influential(influences, data.draw(st.integers(1, len(influences))))
    assert kept == sorted(set(kept))
    dropped = set(range(len(influences))) - set(kept)
    if dropped:
        assert max(influences[index] for index in dropped) <= min(influences[index] for index in kept)
        assert without(len(influences), dropped) == kept


def test_greedy_removal_takes_the_block_that_costs_least(tiny_model_dir: TinyModel) -> None:
    model = load_plain_model(open_checkpoint(tiny_model_dir("mistral")), "cpu", torch.float32)
    kept, found = greedy_kept(model, ids(), 2)
    with torch.no_grad():
        log_p = model.logits(ids()).double().log_softmax(-1)
        costs = {}
        for gone in range(3):
            hidden = model.hidden(ids(), [index for index in range(3) if index != gone])
            log_q = (hidden @ model.head.t()).double().log_softmax(-1)
            costs[gone] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert kept == [index for index in range(3) if index != min(costs, key=lambda one: costs[one])]
    assert found == pytest.approx([min(costs.values())], rel=1e-4)


@pytest.mark.parametrize("kept", [[], [0, 0], [1, 0], [0, 3], [-1]])
def test_blocks_that_are_not_there_are_refused(tiny_model_dir: TinyModel, kept: list[int]) -> None:
    with pytest.raises(PowertrainError, match="layers to keep"):
        depth_pruned(open_checkpoint(tiny_model_dir("mistral")), kept)


def test_dropping_all_or_unknown_layers_is_refused() -> None:
    for dropped in ({0, 1}, {2}):
        with pytest.raises(PowertrainError, match="layers to drop"):
            without(2, dropped)
    with pytest.raises(PowertrainError, match="1 to 2"):
        most_influential([0.1, 0.2], 3)


def test_a_recipe_takes_out_the_blocks_of_least_influence(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model_dir("mistral")
    samples = ids(4, 32)
    compress(folder, tmp_path / "out", "prune-depth-third", calibration=samples.tolist(), num_samples=4, length=32)
    influences = block_influence(open_checkpoint(folder), samples)
    assert read_manifest(tmp_path / "out")["recipe"]["steps"] == [
        {"method": "prune_depth", "share": 1 / 3, "choose": "influence"}
    ]
    gone = influences.index(min(influences))
    expected, found = depth_pruned(open_checkpoint(folder), without(3, [gone])), open_checkpoint(tmp_path / "out")
    for name in found.names():
        assert torch.equal(found.load(name), expected.load(name).to(torch.bfloat16)), name
    compress(folder, tmp_path / "two", {"steps": [{"method": "prune_depth", "drop": [0, 1]}]})  # needs no text
    assert open_checkpoint(tmp_path / "two").config["num_hidden_layers"] == 1


def test_depth_steps_are_checked_and_told(tiny_model_dir: TinyModel) -> None:
    folder = tiny_model_dir("mistral")
    for entries in ({"share": 0.4}, {"keep": 2}, {"drop": [1]}, {"keep": 2, "choose": "spread"}):
        recipe = load_recipe({"steps": [{"method": "prune_depth", **entries}]})
        assert load_recipe(recipe.to_dict()) == recipe
        assert "2 of 3 blocks stay" in plan_compression(folder, recipe).table()
    for bad, name in (
        ({}, "one of share"),
        ({"keep": 2, "drop": [1]}, "one of share"),
        ({"keep": 4}, "1 to 3"),
        ({"share": 1}, "1 to 3"),
        ({"drop": [1], "choose": "spread"}, "choose not with drop"),
        ({"keep": 2, "choose": "best"}, r"steps\[0\].choose is unknown: 'best'"),
        ({"share": 1, "choose": "spread"}, "1 to 3"),
        ({"drop": "1"}, "list of layer"),
        ({"drop": [3]}, "layers to drop"),
    ):
        with pytest.raises(PowertrainError, match=name):
            plan_compression(folder, {"steps": [{"method": "prune_depth", **bad}]})


@given(st.integers(1, 100), st.data())
def test_spread_blocks_hold_both_ends_and_equal_gaps(num_layers: int, data: st.DataObject) -> None:
    num_kept = data.draw(st.integers(1, num_layers))
    kept = spread(num_layers, num_kept)
    assert len(kept) == num_kept
    assert kept[0] == 0
    if num_kept > 1:
        assert kept[-1] == num_layers - 1
        gaps = {after - before for before, after in pairwise(kept)}
        assert min(gaps) > 0
        assert max(gaps) - min(gaps) <= 1


def test_a_draft_is_a_fifth_of_the_blocks_and_all_of_the_rest(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    (step,) = load_recipe("draft").model_steps
    assert isinstance(step, PruneDepthStep)
    assert [step.num_kept(num_layers) for num_layers in (1, 2, 3, 5, 12, 30, 32)] == [1, 1, 1, 1, 2, 6, 6]
    folder = tiny_model_dir("mistral")
    assert "1 of 3 blocks stay, those numbered 0" in plan_compression(folder, "draft").table()
    compress(folder, tmp_path / "draft", "draft", dtype="float32")  # no calibration text
    source, draft = open_checkpoint(folder), open_checkpoint(tmp_path / "draft")
    assert draft.config["num_hidden_layers"] == 1
    assert set(draft.names()) == {name for name in source.names() if block_of(name) in (None, 0)}
    for name in draft.names():
        assert torch.equal(draft.load(name), source.load(name)), name
    tokenizers = [(path / "tokenizer.json").read_bytes() for path in (folder, tmp_path / "draft")]
    assert tokenizers[0] == tokenizers[1]
