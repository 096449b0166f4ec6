"""The driver: what it writes is judged by compressed-tensors and transformers, read back from disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from safetensors.torch import load_file

import powertrain
from powertrain.checkpoint.compressed_tensors import load_int_weight, scheme_of
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress import CompressionReport, compress, plan_compression
from powertrain.compress.manifest import read_manifest, update_manifest
from powertrain.compress.quantize import rtn
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]

MIXED = {
    "name": "mixed",
    "steps": [
        {"match": "re:.*(gate|up)_proj", "scheme": "W8A16"},
        {"match": "re:.*self_attn", "ignore": "re:.*o_proj", "scheme": "W4A16", "group_size": 32},
        {"match": "model.layers.1.mlp.down_proj", "scheme": "W4A16", "group_size": "channel"},
    ],
}
W4_ASYM_32 = {"steps": [{"match": "Linear", "scheme": "W4A16_ASYM", "group_size": 32}]}
W4_32 = {"steps": [{"match": "Linear", "scheme": "W4A16", "group_size": 32}]}
W3_ASYM_32 = {"steps": [{"match": "Linear", "scheme": "W3A16_ASYM", "group_size": 32}]}
W5_32 = {"steps": [{"match": "Linear", "scheme": "W5A16", "group_size": 32}]}
FEW_BITS = {
    "steps": [
        {"match": "re:.*(gate|up)_proj", "scheme": "W3A16_ASYM", "group_size": 32},
        {"match": "re:.*down_proj", "scheme": "W2A16_ASYM", "group_size": "channel"},
        {"match": "re:.*(q|k)_proj", "scheme": "W5A16", "group_size": 32},
        {"match": "re:.*v_proj", "scheme": "W3A16", "group_size": 32},
        {"match": "re:.*o_proj", "scheme": "W6A16", "group_size": 32},
    ],
}


def quantized_layers(out: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(out)
    layers = [name.removesuffix(".weight_packed") for name in checkpoint.names() if name.endswith(".weight_packed")]
    return {layer: scheme_of(checkpoint.config, layer) for layer in layers}


@pytest.mark.parametrize("recipe", ["W8A16", "W8A16_ASYM", W4_32, W4_ASYM_32, MIXED, FEW_BITS])
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_the_library_decodes_the_integers_that_were_chosen(tiny_model_dir: TinyModel, tmp_path: Path, recipe, dtype):
    source = tiny_model_dir("qwen3")
    report = compress(source, tmp_path / "out", recipe, dtype=dtype)
    tensors, original = load_file(tmp_path / "out" / "model.safetensors"), open_checkpoint(source)
    stored_dtype = {"auto": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}[dtype]
    layers = quantized_layers(tmp_path / "out")
    assert sorted(layers) == sorted(layer.name for layer in report.layers)
    for layer, scheme in layers.items():
        expected, error = rtn(original.load(f"{layer}.weight"), scheme, scale_dtype=stored_dtype)
        shape = torch.Size(tensors[f"{layer}.weight_shape"].tolist())
        assert torch.equal(
            unpack_from_int32(tensors[f"{layer}.weight_packed"], scheme.num_bits, shape), expected.values
        )
        assert torch.equal(tensors[f"{layer}.weight_scale"], expected.scale)
        if expected.zero_point is None:
            assert f"{layer}.weight_zero_point" not in tensors
        else:
            zeros = tensors[f"{layer}.weight_zero_point"]
            unpacked = unpack_from_int32(zeros, scheme.num_bits, expected.zero_point.shape, packed_dim=0)
            assert torch.equal(unpacked, expected.zero_point)
        assert error == next(entry.error for entry in report.layers if entry.name == layer)
    for name in original.names():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(tensors[name], original.load(name).to(stored_dtype))


def transformers_reference(source: Path, out: Path) -> Any:
    """transformers' own dense model of `source` with our dequantized weights and the rounded dense tensors put in."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    checkpoint = open_checkpoint(out)
    if not checkpoint.config["tie_word_embeddings"] and model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer, scheme in quantized_layers(out).items():
            weight = load_int_weight(checkpoint, layer, scheme).dequantize(torch.bfloat16)
            parameters[f"{layer}.weight"].copy_(weight)
    return model


def transformers_logits(model: Any) -> torch.Tensor:
    ids = torch.arange(2, 50).unsqueeze(0)
    with torch.no_grad():
        return model(ids).logits


def head_too(recipe: dict[str, Any]) -> dict[str, Any]:
    return {"steps": [*recipe["steps"], {"match": "lm_head", "scheme": "W8A16"}]}


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", "W8A16"),
        ("llama", W4_32),
        ("qwen2", MIXED),
        ("mistral", MIXED),
        ("qwen3", W4_32),
        ("llama3", head_too(W4_32)),
        ("llama", head_too(W4_32)),
    ],
)
def test_transformers_runs_symmetric_files_as_they_are(tiny_model_dir: TinyModel, tmp_path: Path, family, recipe):
    import transformers

    compress(tiny_model_dir(family), tmp_path / "out", recipe)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = transformers_logits(transformers_reference(tiny_model_dir(family), tmp_path / "out"))
    assert expected.float().std() > 0.1
    assert torch.equal(transformers_logits(loaded), expected)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", W4_ASYM_32), ("qwen3", "W8A16_ASYM"), ("qwen2", "W8A16"), ("llama", W3_ASYM_32), ("qwen3", W5_32)],
)
def test_transformers_dequantizes_asymmetric_files(tiny_model_dir: TinyModel, tmp_path: Path, family, recipe):
    import transformers

    compress(tiny_model_dir(family), tmp_path / "out", recipe)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    expected = transformers_logits(transformers_reference(tiny_model_dir(family), tmp_path / "out"))
    assert torch.equal(transformers_logits(loaded), expected)


def test_a_tied_head_is_untied_on_purpose_and_counted(tiny_model_dir: TinyModel, tmp_path: Path):
    source = tiny_model_dir("llama")
    report = compress(source, tmp_path / "out", {"steps": [{"match": "lm_head", "scheme": "W8A16"}]})
    out = open_checkpoint(tmp_path / "out")
    assert out.config["tie_word_embeddings"] is False
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= set(out.names())
    assert "lm_head.weight" not in out.names()
    embedding = open_checkpoint(source).load("model.embed_tokens.weight")
    expected, _ = rtn(embedding, report.recipe.steps[0].scheme, scale_dtype=torch.bfloat16)
    assert torch.equal(load_int_weight(out, "lm_head", report.recipe.steps[0].scheme).values, expected.values)
    assert any("lm_head is tied" in note and "20,480" in note for note in report.notes)
    # Both copies are in the size, the weights are counted once.
    assert report.num_parameters == sum(t.numel() for t in load_file(source / "model.safetensors").values())
    assert report.bits_per_weight > 16


def test_a_pattern_does_not_untie_a_head_but_takes_an_untied_one(tiny_model_dir: TinyModel):
    everything = {"steps": [{"match": "re:.*", "scheme": "W8A16"}]}
    tied, untied = (plan_compression(tiny_model_dir(family), everything) for family in ("llama", "qwen3"))
    assert "lm_head" not in [layer.name for layer in tied.layers]
    assert not tied.unties_head
    assert "lm_head" in [layer.name for layer in untied.layers]


def test_an_untied_head_stays_dense_unless_named(tiny_model_dir: TinyModel, tmp_path: Path):
    compress(tiny_model_dir("qwen3"), tmp_path / "out", "W8A16")
    assert "lm_head.weight" in open_checkpoint(tmp_path / "out").names()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_sizes_add_up_and_the_plan_knows_them_before(tiny_model_dir: TinyModel, tmp_path: Path):
    for number, recipe in enumerate(["W8A16", W4_32, W4_ASYM_32, MIXED, "W8A16_ASYM", FEW_BITS]):
        plan = plan_compression(tiny_model_dir("mistral"), recipe)
        report = compress(tiny_model_dir("mistral"), tmp_path / str(number), recipe)
        tensors = load_file(tmp_path / str(number) / "model.safetensors")
        assert report.nbytes == sum(tensor.nbytes for tensor in tensors.values()) == plan.nbytes
        original = load_file(tiny_model_dir("mistral") / "model.safetensors")
        num_parameters = sum(tensor.numel() for tensor in original.values())
        assert report.bits_per_weight == plan.bits_per_weight == 8 * report.nbytes / num_parameters


def test_the_plan_is_a_table_of_what_each_layer_gets(tiny_model_dir: TinyModel):
    text = plan_compression(tiny_model_dir("llama"), MIXED).table()
    assert "model.layers.*.mlp.gate_proj" in text
    assert "rtn W8A16 channel" in text
    assert "rtn W4A16 group 32" in text
    assert "bits per weight" in text
    assert "stay dense in bfloat16" in text


def test_the_observer_of_a_step_chooses_the_ranges(tiny_model_dir: TinyModel, tmp_path: Path):
    step = {"match": "Linear", "scheme": "W3A16", "group_size": 32}
    plain = compress(tiny_model_dir("llama"), tmp_path / "minmax", {"steps": [step]})
    searched = compress(tiny_model_dir("llama"), tmp_path / "mse", {"steps": [step | {"observer": "mse"}]})
    pairs = zip(plain.layers, searched.layers, strict=True)
    assert all(theirs.error < ours.error and theirs.nbytes == ours.nbytes for ours, theirs in pairs)
    assert read_manifest(tmp_path / "mse")["recipe"]["steps"][0]["observer"] == "mse"
    assert "rtn W3A16 group 32 mse" in plan_compression(tiny_model_dir("llama"), searched.recipe).table()


def test_the_manifest_tells_the_whole_story(tiny_model_dir: TinyModel, tmp_path: Path):
    source = tiny_model_dir("llama")
    report = compress(str(source), tmp_path / "out", W4_32)
    manifest = read_manifest(tmp_path / "out")
    assert manifest == {**report.to_dict(), "created": manifest["created"]} | {"layers": manifest["layers"]}
    assert manifest["schema"] == 1
    assert manifest["recipe"]["steps"][0]["group_size"] == 32
    assert len(manifest["source"]["sha256"]) == 64
    assert len(manifest["layers"]) == 14
    assert all(0.001 < layer["error"] < 0.02 for layer in manifest["layers"])
    assert manifest["evaluation"] is None
    update_manifest(tmp_path / "out", evaluation={"kl_mean": 0.25})
    assert read_manifest(tmp_path / "out") == {**manifest, "evaluation": {"kl_mean": 0.25}}
    assert not list((tmp_path / "out").glob(".powertrain*"))


def test_the_tokenizer_and_template_travel_with_the_weights(tiny_model_dir: TinyModel, tmp_path: Path):
    from powertrain.checkpoint.tokenizer_files import load_tokenizer

    compress(tiny_model_dir("llama"), tmp_path / "out", "W8A16")
    before, after = load_tokenizer(tiny_model_dir("llama")), load_tokenizer(tmp_path / "out")
    messages = [{"role": "user", "content": "How far is it to 東京?"}]
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)
    assert after.eos_token_ids == before.eos_token_ids


def test_a_group_that_divides_no_row_is_refused_before_anything_is_written(tiny_model_dir: TinyModel, tmp_path: Path):
    message = r"model\.layers\.0\.mlp\.down_proj: group_size 64 does not divide 96; sizes that do: 32 \(or `channel`\)"
    with pytest.raises(PowertrainError, match=message):
        compress(tiny_model_dir("llama"), tmp_path / "out", "W4A16")
    assert list(tmp_path.iterdir()) == []


def test_nearest_takes_a_dividing_size_per_layer_and_says_so(tiny_model_dir: TinyModel, tmp_path: Path):
    import transformers

    recipe = {"steps": [{"match": "Linear", "scheme": "W4A16", "group_size_fallback": "nearest"}]}
    report = compress(tiny_model_dir("llama"), tmp_path / "out", recipe)
    sizes = {layer.name.rsplit(".", 1)[1]: layer.group_size for layer in report.layers}
    assert sizes["down_proj"] == 32
    assert sizes["q_proj"] == 64
    note = "group_size 64 does not divide 96, 32 is used: 2 matrices (e.g. model.layers.0.mlp.down_proj)"
    assert report.notes == (note,)
    groups = open_checkpoint(tmp_path / "out").config["quantization_config"]["config_groups"].values()
    assert sorted(group["weights"]["group_size"] for group in groups) == [32, 64]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = transformers_logits(transformers_reference(tiny_model_dir("llama"), tmp_path / "out"))
    assert torch.equal(transformers_logits(loaded), expected)


def test_an_interrupted_compression_leaves_nothing(tiny_model_dir: TinyModel, tmp_path: Path):
    def stop(what: str, done: float, total: float | None) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny_model_dir("llama"), tmp_path / "out", "W8A16", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_reaches_its_total(tiny_model_dir: TinyModel, tmp_path: Path):
    calls: list[tuple[str, float, float | None]] = []
    compress(tiny_model_dir("llama"), tmp_path / "out", "W8A16", progress=lambda *call: calls.append(call))
    assert calls[-1][1] == calls[-1][2] == len(calls)


def test_an_existing_folder_is_replaced_only_when_asked(tiny_model_dir: TinyModel, tmp_path: Path):
    compress(tiny_model_dir("llama"), tmp_path / "out", "W8A16")
    with pytest.raises(PowertrainError, match="out already holds a model"):
        compress(tiny_model_dir("llama"), tmp_path / "out", W4_32)
    compress(tiny_model_dir("llama"), tmp_path / "out", W4_32, overwrite=True)
    assert {scheme.num_bits for scheme in quantized_layers(tmp_path / "out").values()} == {4}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(PowertrainError, match="was not written by powertrain"):
        compress(tiny_model_dir("llama"), tmp_path / "mine", W4_32, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose"


def test_a_compressed_source_and_a_bad_dtype_are_refused(tiny_model_dir: TinyModel, tmp_path: Path):
    compress(tiny_model_dir("llama"), tmp_path / "out", "W8A16")
    with pytest.raises(PowertrainError, match="is already quantized: compress the model it was made from"):
        compress(tmp_path / "out", tmp_path / "again", "W8A16")
    with pytest.raises(PowertrainError, match="dtype 'int8' is unknown; the known ones are auto, float32"):
        compress(tiny_model_dir("llama"), tmp_path / "again", "W8A16", dtype="int8")


def test_a_device_that_is_not_there_is_refused(tiny_model_dir: TinyModel, tmp_path: Path):
    with pytest.raises(PowertrainError, match="device 'tpu' is unknown; the known ones are auto, cpu, cuda"):
        compress(tiny_model_dir("llama"), tmp_path / "out", "W8A16", device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(PowertrainError, match="torch sees no CUDA device"):
            compress(tiny_model_dir("llama"), tmp_path / "out", "W8A16", device="cuda")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_weight_is_named(tiny_model_dir: TinyModel, tmp_path: Path):
    from safetensors.torch import save_file

    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_model_dir("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    for name in ("model.layers.1.self_attn.v_proj.weight", "model.norm.weight"):
        tensors = load_file(tiny_model_dir("llama") / "model.safetensors")
        tensors[name].view(-1)[3] = float("nan")
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(PowertrainError, match=name.removesuffix(".weight")):
            compress(source, tmp_path / "out", "W8A16")
        assert not (tmp_path / "out").exists()


def test_the_package_is_the_function_in_either_order(tiny_model_dir: TinyModel, tmp_path: Path):
    import powertrain.compress as module
    from powertrain import compress as public

    assert callable(module)
    report = public(tiny_model_dir("llama"), tmp_path / "a", "W8A16")
    assert isinstance(report, CompressionReport)
    assert isinstance(powertrain.compress(tiny_model_dir("llama"), tmp_path / "b", "W8A16"), CompressionReport)
    assert "wrote" in report.summary()


def test_the_default_model_from_its_gguf_file(smollm2_gguf: Path, tmp_path: Path):
    plan = plan_compression(smollm2_gguf, "W4A16")
    assert len(plan.layers) == 210
    assert plan.num_parameters == 134_515_008
    with pytest.raises(PowertrainError, match=r"q_proj: group_size 128 does not divide 576; sizes that do: 32, 64, 96"):
        plan_compression(smollm2_gguf, {"steps": [{"match": "re:.*q_proj", "scheme": "W4A16", "group_size": 128}]})


@pytest.mark.big
def test_the_default_model_compressed(smollm2_gguf: Path, tmp_path: Path):
    from powertrain.checkpoint.tokenizer_files import load_tokenizer

    report = compress(smollm2_gguf, tmp_path / "out", "W4A16")
    print(report.summary())
    assert report.warnings[0].startswith("source is already quantized: 210 of 211 matrices")
    tokenizer, again = load_tokenizer(smollm2_gguf), load_tokenizer(tmp_path / "out")
    messages = [{"role": "user", "content": "Count: 1234567 and 89."}]
    assert tokenizer.apply_chat_template(messages) == again.apply_chat_template(messages)
    assert tokenizer.eos_token_ids == again.eos_token_ids
