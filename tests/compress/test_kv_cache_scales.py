"""Scales of keys and values: measured once more, and run, by the library inside transformers' own attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.driver import compress, plan_compression
from powertrain.compress.kv_cache import CacheSizes
from powertrain.compress.manifest import read_manifest
from powertrain.compress.recipe import load_recipe
from powertrain.measure.scoring import count_parameters
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
IDS = torch.arange(80) * 13 % 300
W8A16: dict[str, Any] = {"match": "Linear", "scheme": "W8A16"}
FP8: dict[str, Any] = {"match": "Linear", "scheme": "FP8"}


def cache(**entries: Any) -> dict[str, Any]:
    return {"method": "kv_cache", "scheme": "fp8", **entries}


def text(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 300, (count, length), generator=generator).tolist()


def transformers_model(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def library_ranges(model: Any, ids: torch.Tensor, *, by_head: bool) -> dict[str, torch.Tensor]:
    """The largest keys and values that come to the library's cache, none of them or of the inputs rounded."""
    from compressed_tensors.modeling import register_key_hook, register_value_hook

    found: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Callable[[Any, torch.Tensor], None]:
        def hook(_: Any, states: torch.Tensor) -> None:
            sizes = states.abs().amax((0, 2, 3))
            found[name] = sizes.view(-1, 1, 1) if by_head else sizes.amax().view(1)

        return hook

    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
        if name.endswith("self_attn"):
            register_key_hook(module, remember(f"{name}.k_scale"))
            register_value_hook(module, remember(f"{name}.v_scale"))
    with torch.no_grad():
        model(ids)
    return found


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        ("llama", [cache()]),
        ("qwen3", [W8A16, cache(strategy="attn_head")]),
        ("mistral", [{**W8A16, "method": "gptq", "scheme": "W4A16", "group_size": 32}, cache(scheme="int8")]),
        ("qwen2", [{"method": "rotate"}, FP8, cache(scheme="int8", strategy="attn_head")]),
    ],
)
def test_scales_are_those_of_the_librarys_keys_and_values(
    tiny_model_dir: TinyModel, tmp_path: Path, family: str, steps: list[dict[str, Any]]
) -> None:
    calibration, recipe = text(6, 40, 1), {"steps": steps}
    source, options = tiny_model_dir(family), {"length": 40, "dtype": "float32"}
    plan = plan_compression(source, recipe, dtype="float32")
    report = compress(source, tmp_path / "out", recipe, calibration=calibration, **options)
    assert report.nbytes == plan.nbytes
    made, by_head = open_checkpoint(tmp_path / "out"), steps[-1].get("strategy") == "attn_head"
    stored = {name: made.load(name) for name in made.names() if name.endswith(("k_scale", "v_scale"))}
    assert len(stored) == 2 * made.config["num_hidden_layers"]
    model = transformers_model(tmp_path / "out")
    registered = {name: tensor for name, tensor in model.named_parameters() if name in stored}
    assert registered.keys() == stored.keys()
    ranges = library_ranges(model, torch.tensor(calibration), by_head=by_head)
    steps_of = 448 if steps[-1]["scheme"] == "fp8" else 127.5
    for name, scale in stored.items():
        assert torch.equal(registered[name], scale)
        torch.testing.assert_close(scale * steps_of, ranges[name], rtol=1e-3, atol=0)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_the_library_reads_the_scheme_and_runs_it_near_the_plain_model(
    tiny_model_dir: TinyModel, tmp_path: Path, scheme: str
) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

    source = tiny_model_dir("llama3")
    compress(source, tmp_path / "out", {"steps": [cache(scheme=scheme)]}, calibration=text(24, 64, 1), length=64)
    config = QuantizationConfig.model_validate(open_checkpoint(tmp_path / "out").config["quantization_config"])
    kind = {"fp8": "float", "int8": "int"}[scheme]
    assert config.kv_cache_scheme == QuantizationArgs(num_bits=8, type=kind, strategy="tensor", symmetric=True)
    assert config.config_groups == {}
    with torch.no_grad():
        plain, rounded = (transformers_model(path)(IDS[None]).logits[0] for path in (source, tmp_path / "out"))
    difference = (rounded - plain).norm() / plain.norm()
    assert 1e-4 < difference < 0.1


def test_it_measures_what_the_other_steps_leave(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    source, found = tiny_model_dir("llama"), []
    for number, before in enumerate([[], [{**W8A16, "scheme": "W2A16", "group_size": 32}]]):
        out = tmp_path / str(number)
        compress(source, out, {"steps": [*before, cache()]}, calibration=text(4, 40, 1), length=40)
        found.append(float(open_checkpoint(out).load("model.layers.0.self_attn.k_scale")))
    assert not math.isclose(*found, rel_tol=0.01)


def test_the_plan_the_report_and_the_manifest_say_so(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    source, recipe = tiny_model_dir("llama"), {"steps": [FP8, cache(strategy="attn_head")]}
    note = "kv_cache: fp8 keys and values, scales for each head (2 a layer) from calibration text"
    assert note in plan_compression(source, recipe).table()
    report = compress(source, tmp_path / "out", recipe, calibration=text(4, 40, 1), length=40)
    assert note in report.summary()
    assert "kv_cache: on the calibration text keys reach " in report.summary()
    manifest = read_manifest(tmp_path / "out")
    assert manifest["recipe"]["steps"][-1] == {"method": "kv_cache", "scheme": "fp8", "strategy": "attn_head"}
    assert load_recipe(manifest["recipe"]) == report.recipe
    assert count_parameters(open_checkpoint(tmp_path / "out")) == report.num_parameters
    # whole sequences at once have no cache
    ours, plain = (load_model(open_checkpoint(path), "cpu", torch.float32) for path in (tmp_path / "out", source))
    assert ours.kv_cache_dtype == plain.kv_cache_dtype == "float32"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([cache(scheme="int4")], r"steps\[0\]\.scheme: int4 has scales that are found as tokens come, .*dtype int4"),
        ([cache(strategy="channel")], r"steps\[0\]\.strategy: channel has scales .* `evaluate --kernels reference"),
        ([cache(strategy="token")], r"steps\[0\]\.strategy: token has scales that are found as tokens come"),
        ([cache(scheme="e5m2")], r"steps\[0\]\.scheme is unknown: 'e5m2'; the known ones are fp8, int8"),
        ([{"method": "kv_cache"}], r"steps\[0\]\.scheme is missing; the known ones are fp8, int8"),
        ([cache(strategy="block")], r"strategy is unknown: 'block'; the known ones are tensor, attn_head"),
        ([cache(match="Linear")], r"steps\[0\]: unknown key 'match'; the known ones are scheme, strategy"),
        ([cache(), W8A16], r"steps\[0\]: kv_cache measures what all others leave: put it last"),
        ([cache(), cache()], r"steps\[0\]: kv_cache measures what all others leave: put it last"),
    ],
)
def test_what_has_no_place_in_a_file_is_refused(steps: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(PowertrainError, match=message):
        load_recipe({"steps": steps})


def test_it_needs_text(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(PowertrainError, match=r"^kv_cache needs calibration text: give --calibration FILE"):
        compress(tiny_model_dir("llama"), tmp_path / "out", {"steps": [W8A16, cache()]})
    assert not (tmp_path / "out").exists()


def test_ranges_grow_and_must_be_numbers() -> None:
    keys, sizes = torch.randn(3, 2, 7, 4, generator=torch.Generator().manual_seed(0)), CacheSizes()
    for part in keys:
        sizes.add(part[None], part[None] * 0)
    recipe = load_recipe({"steps": [cache()]})
    assert recipe.kv_cache is not None
    assert torch.equal(sizes.largest("a")[0], keys.abs().amax((0, 2, 3)))
    made = sizes.tensors("a", recipe.kv_cache.scheme, 2)
    assert made["a.v_scale"].tolist() == [1.0]  # values of zeros alone
    sizes.add(keys, keys / 0)
    with pytest.raises(PowertrainError, match="a: its values hold NaN or infinity on the calibration text"):
        sizes.largest("a")
