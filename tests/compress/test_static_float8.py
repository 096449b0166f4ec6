"""The preset FP8: input scales from calibration text, judged by what the library's own layers see and compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.quantized import load_quantized
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.driver import compress, plan_compression
from powertrain.compress.floats import static_input_scale, to_float8
from powertrain.compress.manifest import read_manifest
from powertrain.compress.recipe import load_recipe
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
FP8: dict[str, Any] = {"match": "Linear", "scheme": "FP8"}
IDS = torch.arange(80) * 13 % 300
SHARED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def text(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 300, (count, length), generator=generator).tolist()


def transformers_model(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        ("llama", [FP8]),
        ("qwen3", [{**FP8, "method": "gptq"}]),
        ("llama3", [{"method": "rotate"}, {"method": "smoothquant"}, {**FP8, "match": ["Linear", "lm_head"]}]),
    ],
)
def test_scales_are_the_largest_inputs_of_the_compressed_model_over_448(
    tiny_model_dir: TinyModel, tmp_path: Path, family: str, steps: list[dict[str, Any]]
) -> None:
    """transformers runs the folder with rounded weights and inputs left alone, as calibration does."""
    calibration, out = text(6, 40, 1), tmp_path / "out"
    report = compress(
        tiny_model_dir(family), out, {"steps": steps}, calibration=calibration, length=40, dtype="float32"
    )
    model, largest = transformers_model(out), {}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
            module.register_forward_pre_hook(
                lambda _, given, name=name: largest.update({name: float(given[0].abs().amax())})
            )
    with torch.no_grad():
        model(torch.tensor(calibration))
    made = open_checkpoint(out)
    found = {layer.name: float(made.load(f"{layer.name}.input_scale")) for layer in report.layers}
    assert found == {layer.name: layer.input_scale for layer in report.layers}
    assert {name: scale * 448 for name, scale in found.items()} == pytest.approx(largest, rel=1e-3)


def test_what_reads_the_same_input_has_the_same_scales(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    """Others multiply by such matrices as one, and would have to round them anew."""
    compress(tiny_model_dir("qwen2"), tmp_path / "out", "FP8", calibration=text(4, 40, 1), length=40)
    made, source = open_checkpoint(tmp_path / "out"), open_checkpoint(tiny_model_dir("qwen2"))
    for names in SHARED:
        layers = [f"model.layers.1.{name}" for name in names]
        for kind in ("input_scale", "weight_scale"):
            assert {tuple(made.load(f"{layer}.{kind}").shape) for layer in layers} == {(1,)}
            assert len({float(made.load(f"{layer}.{kind}")) for layer in layers}) == 1
        largest = max(float(source.load(f"{layer}.weight").abs().amax()) for layer in layers)
        assert float(made.load(f"{layers[0]}.weight_scale")) == pytest.approx(largest / 448)
    model = load_model(made, "cpu", torch.float32)
    assert model.formats() == ["float32", "fp8 a8 static"]
    assert [len(linear.formats) for linear in model.blocks[0].linears()] == [1, 1, 1, 1]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_library_decodes_and_runs_the_folder_alike(tiny_model_dir: TinyModel, tmp_path: Path, method: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    source, recipe = tiny_model_dir("llama"), {"steps": [{**FP8, "method": method}]}
    plan = plan_compression(source, recipe, dtype="float32")
    report = compress(source, tmp_path / "out", recipe, calibration=text(24, 64, 1), length=64, dtype="float32")
    assert report.nbytes == plan.nbytes
    made = open_checkpoint(tmp_path / "out")
    [scheme] = QuantizationConfig.model_validate(made.config["quantization_config"]).config_groups.values()
    preset = preset_name_to_scheme("FP8", ["Linear"])
    assert (scheme.format, scheme.weights) == ("float-quantized", preset.weights)
    assert scheme.input_activations.model_dump() == preset.input_activations.model_dump()
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    name = "model.layers.1.mlp.down_proj"
    tensors = {n.rsplit(".", 1)[-1]: made.load(n) for n in made.names() if n.startswith(f"{name}.")}
    ours = load_quantized(made, name, (64, 96))
    assert ours is not None
    assert torch.equal(ours.weight.dequantize(), compressor.decompress(tensors, scheme)["weight"])
    with torch.no_grad():
        expected = transformers_model(tmp_path / "out")(IDS[None]).logits[0]
    logits, plain = (load_model(open_checkpoint(path), "cpu", torch.float32).score(IDS) for path in (made.path, source))
    assert (logits - expected).abs().mean() < 0.2 * (plain - expected).abs().mean()


def test_gptq_is_nearer_than_rounding_to_nearest(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    source, errors = tiny_model_dir("llama3"), {}
    reference = load_model(open_checkpoint(source), "cpu", torch.float32)
    for method in ("rtn", "gptq"):
        recipe = {"steps": [{**FP8, "method": method}]}
        compress(source, tmp_path / method, recipe, calibration=text(48, 64, 1), length=64, dtype="float32")
        model = load_model(open_checkpoint(tmp_path / method), "cpu", torch.float32)
        pairs = [(model.score(ids), reference.score(ids)) for ids in map(torch.tensor, text(6, 64, 2))]
        errors[method] = sum(float((ours - theirs).square().mean()) for ours, theirs in pairs)
    assert errors["gptq"] < errors["rtn"]


def test_the_recipe_the_plan_and_the_manifest_say_so(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    recipe = load_recipe("FP8")
    assert recipe.is_calibrated
    assert not load_recipe("FP8_DYNAMIC").is_calibrated
    assert load_recipe(recipe.to_dict()) == recipe
    assert "rtn FP8 tensor, one input scale" in plan_compression(tiny_model_dir("llama"), "FP8").table()
    with pytest.raises(PowertrainError, match=r"^FP8 needs calibration text: give --calibration FILE"):
        compress(tiny_model_dir("llama"), tmp_path / "out", "FP8")
    assert not (tmp_path / "out").exists()
    compress(tiny_model_dir("llama"), tmp_path / "out", "FP8", calibration=text(4, 20, 1), length=20)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["calibration"]["num_samples"] == 4
    assert all(layer["input_scale"] > 0 and layer["group_size"] == "tensor" for layer in manifest["layers"])


def test_one_scale_of_several_matrices() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    rounded, _ = to_float8(weight, "tensor", absmax=7.0)
    assert torch.equal(rounded.scale, torch.full((24,), 7.0) / 448)
    assert torch.equal(rounded.values.float(), (weight / rounded.scale[0]).to(torch.float8_e4m3fn).float())
    with pytest.raises(PowertrainError, match=r"up_proj: absmax 0\.5 is below its largest weight"):
        to_float8(weight, "tensor", absmax=0.5, name="up_proj")


def test_inputs_that_are_zero_or_no_numbers() -> None:
    assert static_input_scale(torch.zeros(3), "up_proj") == 1.0
    with pytest.raises(PowertrainError, match="up_proj: its inputs hold NaN or infinity on the calibration text"):
        static_input_scale(torch.tensor([1.0, float("inf")]), "up_proj")
