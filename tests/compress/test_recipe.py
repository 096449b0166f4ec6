"""Recipes: what they say, and that whatever is unknown or ambiguous is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from powertrain.compress.recipe import CHANNEL, Recipe, load_recipe
from powertrain.types import PowertrainError, QuantScheme

LAYERS = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn.q_proj", "mlp.down_proj")] + ["lm_head"]


def test_a_yaml_file_and_a_dictionary_say_the_same(tmp_path: Path):
    file = tmp_path / "mixed.yaml"
    file.write_text(
        'steps:\n  - {match: "re:.*q_proj", scheme: W8A16}\n'
        "  - match: [model.layers.0.mlp.down_proj]\n    method: rtn\n    scheme: W4A16_ASYM\n    group_size: 32\n"
    )
    recipe = load_recipe(file)
    same = load_recipe(
        {
            "name": "mixed",
            "steps": [
                {"match": "re:.*q_proj", "scheme": "W8A16"},
                {"match": ["model.layers.0.mlp.down_proj"], "scheme": "W4A16_ASYM", "group_size": 32},
            ],
        }
    )
    assert recipe == same
    assert recipe.steps[0].scheme == QuantScheme(num_bits=8)
    assert recipe.steps[1].scheme == QuantScheme(num_bits=4, group_size=32, symmetric=False)
    assert load_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("preset", "scheme"),
    [
        ("W4A16", QuantScheme(num_bits=4, group_size=64)),
        ("W4A16_ASYM", QuantScheme(num_bits=4, group_size=64, symmetric=False)),
        ("W2A16", QuantScheme(num_bits=2, group_size=64)),
        ("W2A16_ASYM", QuantScheme(num_bits=2, group_size=64, symmetric=False)),
        ("W3A16", QuantScheme(num_bits=3, group_size=64)),
        ("W3A16_ASYM", QuantScheme(num_bits=3, group_size=64, symmetric=False)),
        ("W5A16", QuantScheme(num_bits=5, group_size=64)),
        ("W6A16", QuantScheme(num_bits=6, group_size=64)),
        ("W8A16", QuantScheme(num_bits=8)),
        ("W8A16_ASYM", QuantScheme(num_bits=8, symmetric=False)),
    ],
)
def test_a_preset_takes_every_decoder_matrix_and_leaves_the_head(preset: str, scheme: QuantScheme):
    recipe = load_recipe(preset)
    assert recipe.name == preset
    assigned = recipe.assign(LAYERS)
    assert sorted(assigned) == sorted(LAYERS[:-1])
    assert {step.scheme for step in assigned.values()} == {scheme}


def test_channel_is_one_group_per_row():
    recipe = load_recipe({"steps": [{"match": "Linear", "scheme": "W4A16", "group_size": CHANNEL}]})
    assert recipe.steps[0].scheme == QuantScheme(num_bits=4)
    assert recipe.to_dict()["steps"][0]["group_size"] == "channel"


def test_the_observer_is_min_and_max_unless_a_step_says_otherwise():
    assert load_recipe("W3A16").steps[0].observer == "minmax"
    recipe = load_recipe({"steps": [{"match": "Linear", "scheme": "W3A16", "observer": "mse"}]})
    assert recipe.steps[0].observer == "mse"
    assert load_recipe(recipe.to_dict()) == recipe


def step(**entries):
    return {"steps": [{"match": "Linear", "scheme": "W4A16", **entries}]}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("W1A16", "recipe 'W1A16' is neither a file nor a preset; the presets are W4A16"),
        ({"steps": []}, "recipe: steps must be a list of at least one step"),
        ({"step": []}, "recipe: unknown key 'step'; the known ones are name, steps"),
        ({"steps": ["W4A16"]}, r"steps\[0\]: a step is a mapping"),
        (step(groupsize=64), r"recipe: steps\[0\]: unknown key 'groupsize'; the known ones are match, ignore"),
        (step(method="hqq"), r"steps\[0\].method is unknown: 'hqq'; the known ones are rtn, gptq, autoround"),
        (step(scheme="W1A16"), r"steps\[0\].scheme is unknown: 'W1A16'; the known ones are W4A16"),
        (step(observer="max"), r"steps\[0\].observer is unknown: 'max'; the known ones are minmax, mse"),
        ({"steps": [{"match": "Linear"}]}, r"steps\[0\].scheme is missing; the known ones are W4A16"),
        ({"steps": [{"scheme": "W4A16"}]}, r"steps\[0\].match must be"),
        (step(group_size=0), r"steps\[0\].group_size must be a positive integer or `channel`, got 0"),
        (step(group_size=True), r"steps\[0\].group_size must be a positive integer or `channel`, got True"),
        (step(group_size="64"), r"steps\[0\].group_size must be a positive integer or `channel`, got '64'"),
        (step(group_size_fallback="pad"), r"group_size_fallback is unknown: 'pad'; the known ones are refuse, nearest"),
        (step(match="re:("), r"steps\[0\].match: 're:\(' is not a regular expression"),
        (step(match=3), r"steps\[0\].match must be"),
        (step(match=[]), r"steps\[0\].match must be"),
    ],
)
def test_what_is_unknown_is_refused_by_name(recipe, message: str):
    with pytest.raises(PowertrainError, match=message):
        load_recipe(recipe)


@pytest.mark.parametrize("content", ["steps: [", "- just\n- a list\n", "\x00\x01", "3"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: str):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(PowertrainError, match=r"bad\.yaml") as caught:
        load_recipe(file)
    assert "\n" not in str(caught.value)


def test_yaml_cannot_run_code(tmp_path: Path):
    file = tmp_path / "evil.yaml"
    file.write_text(f"steps: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(PowertrainError, match=r"evil\.yaml"):
        load_recipe(file)
    assert not (tmp_path / "made").exists()


def test_a_layer_matched_twice_names_both_steps():
    recipe = load_recipe(
        {"steps": [{"match": "re:.*q_proj", "scheme": "W8A16"}, {"match": "Linear", "scheme": "W4A16"}]}
    )
    message = (
        r"layers\.0\.self_attn\.q_proj is matched by steps\[0\] \('re:\.\*q_proj'\) and by steps\[1\] \('Linear'\)"
    )
    with pytest.raises(PowertrainError, match=message):
        recipe.assign(LAYERS)


def test_ignore_settles_it():
    recipe = load_recipe(
        {
            "steps": [
                {"match": "re:.*q_proj", "scheme": "W8A16"},
                {"match": "Linear", "ignore": "re:.*q_proj", "scheme": "W4A16"},
            ]
        }
    )
    assert [s.scheme.num_bits for s in recipe.assign(LAYERS).values()] == [8, 4, 8, 4]


def test_a_step_that_fits_nothing_is_an_error_with_examples():
    recipe = load_recipe({"steps": [{"match": "re:.*query", "scheme": "W8A16"}]})
    with pytest.raises(PowertrainError, match=r"steps\[0\]: match 're:\.\*query' fits no layer \(e\.g\. model\.layers"):
        recipe.assign(LAYERS)


def test_the_head_is_only_taken_when_named():
    assert "lm_head" not in load_recipe("W8A16").assign(LAYERS)
    named = load_recipe({"steps": [{"match": "lm_head", "scheme": "W8A16"}]})
    assert isinstance(named, Recipe)
    assert list(named.assign(LAYERS)) == ["lm_head"]
