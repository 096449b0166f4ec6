"""Back to plain floats: transformers loads the folder, and its weights are what the compressed ones stood for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from gguf_builder import build_gguf
from powertrain.checkpoint.export_folder import export_folder
from powertrain.checkpoint.plain import read_weight, weight_shapes
from powertrain.checkpoint.quantized import QuantizedMatrix
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.compress import compress
from powertrain.model.families import model_config
from powertrain.types import ModelFileError, PowertrainError

TinyModel = Callable[[str], Path]


def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(5, 45).unsqueeze(0)).logits[0]
    return logits


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_a_plain_folder_stays_as_it_is(tiny_model_dir: TinyModel, tmp_path: Path, family: str) -> None:
    source = tiny_model_dir(family)
    report = export_folder(open_checkpoint(source), tmp_path / "m", "f32")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "m" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.num_tensors == len(before)
    assert report.nbytes == sum(tensor.nbytes for tensor in before.values())
    assert load_tokenizer(tmp_path / "m").encode("Once 12") == load_tokenizer(source).encode("Once 12")


@pytest.mark.parametrize("recipe", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC", "NVFP4A16"])
def test_transformers_loads_what_was_compressed(tiny_model_dir: TinyModel, tmp_path: Path, recipe: str) -> None:
    step = {"match": "Linear", "method": "rtn", "scheme": recipe}
    if recipe.startswith("W4"):
        step["group_size"] = 32
    compress(tiny_model_dir("llama"), tmp_path / "c", {"steps": [step]})
    source = open_checkpoint(tmp_path / "c")
    report = export_folder(source, tmp_path / "m", "f32")
    assert ("activations are no longer rounded: 14" in report.summary()) == (recipe in ("W8A8", "FP8_DYNAMIC"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"
    plain = open_checkpoint(tmp_path / "m")
    for name, shape in weight_shapes(model_config(source.config)).items():
        stored = read_weight(source, name, shape)
        meant = stored.weight.dequantize() if isinstance(stored, QuantizedMatrix) else stored.float()
        assert torch.equal(plain.load(name), meant), name
    from powertrain.checkpoint.load import load_model

    ours = load_model(plain, "cpu", torch.float32).score(torch.arange(5, 45))
    torch.testing.assert_close(transformers_logits(tmp_path / "m"), ours, rtol=1e-3, atol=1e-3)


def test_a_gguf_file_becomes_a_folder(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    path = build_gguf(tiny_model_dir("qwen2"), tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q8_0)
    export_folder(open_checkpoint(path), tmp_path / "m", "bf16")
    source, made = open_checkpoint(path), load_file(tmp_path / "m" / "model.safetensors")
    assert sorted(made) == source.names()
    for name, tensor in made.items():
        assert torch.equal(tensor, source.load(name).bfloat16())
    assert load_tokenizer(tmp_path / "m").encode("Once 12") == load_tokenizer(path).encode("Once 12")
    assert torch.isfinite(transformers_logits(tmp_path / "m")).all()


def test_what_cannot_be_is_refused_and_nothing_is_written(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model_dir("llama"))
    with pytest.raises(PowertrainError, match=r"q4_0 is for a \.gguf file"):
        export_folder(checkpoint, tmp_path / "m", "q4_0")
    real = checkpoint.load
    checkpoint.load = lambda name: real(name) * 1e6  # type: ignore[method-assign]
    with pytest.raises(ModelFileError, match="holds NaN, infinity or a number beyond"):
        export_folder(checkpoint, tmp_path / "m", "f16")
    assert list(tmp_path.iterdir()) == []
