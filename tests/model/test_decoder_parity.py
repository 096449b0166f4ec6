"""Our logits against transformers', family by family."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.driver import compress
from powertrain.model.families import RopeScaling, model_config
from powertrain.model.layers import rope_frequencies
from powertrain.types import ModelFileError

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [512, 7, 1])
def test_float32_logits_equal_transformers(tiny_model_dir, family, chunk):
    folder = tiny_model_dir(family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(open_checkpoint(folder), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, ours.config.vocab_size, (90,), generator=generator)
    with torch.inference_mode():
        expected = theirs(ids.unsqueeze(0)).logits[0].float()
    logits = ours.score(ids, chunk=chunk)
    assert expected.std() > 0.05, "flat logits would hide a difference"
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_stories260k_logits_equal_transformers(stories260k_dir):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories260k_dir, dtype=torch.float32).eval()
    ours = load_model(open_checkpoint(stories260k_dir), "cpu", torch.float32)
    ids = torch.randint(3, 512, (200,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs(ids.unsqueeze(0)).logits[0]
    torch.testing.assert_close(ours.score(ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_gives_the_logits_of_the_folder_it_was_made_from(tiny_model_dir, tiny_gguf, family):
    """q and k rows of llama files are stored permuted, those of qwen files are not: either mistake changes logits."""
    ids = torch.randint(0, 320, (60,), generator=torch.Generator().manual_seed(2))
    folder = load_model(open_checkpoint(tiny_model_dir(family)), "cpu", torch.float32)
    file = load_model(open_checkpoint(tiny_gguf(family, "F32")), "cpu", torch.float32)
    torch.testing.assert_close(file.score(ids), folder.score(ids), atol=1e-5, rtol=0)


def test_rope_factors_of_a_gguf_file_mean_the_llama3_rule(tiny_model_dir):
    """GGUF stores the divisor of each frequency where config.json states the rule."""
    config = model_config(open_checkpoint(tiny_model_dir("llama3")).config)
    stretched = rope_frequencies(config)
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    factors = tuple((plain / stretched).tolist())
    assert max(factors) == pytest.approx(8.0)
    by_factors = dataclasses.replace(config, rope_scaling=RopeScaling(kind="factors", factors=factors))
    torch.testing.assert_close(rope_frequencies(by_factors), stretched)


@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_weight_bytes_are_what_is_held(tiny_model_dir, family):
    """On a CPU a tied head is a second copy, in the layout of the product, and counts as one."""
    model = load_model(open_checkpoint(tiny_model_dir(family)), "cpu", torch.float32)
    config = model.config
    block = sum(rows * cols for rows, cols in config.linear_shapes().values())
    matrices = config.num_layers * block + 2 * config.vocab_size * config.hidden_size
    assert model.weight_bytes() == 4 * matrices
    assert model.step_bytes() == 4 * (matrices - config.vocab_size * config.hidden_size)


def test_a_missing_tensor_is_named(tiny_model_dir, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match=r"model\.layers\.2\..* is missing"):
        load_model(open_checkpoint(folder), "cpu", torch.float32)


def test_the_older_key_of_a_quantized_config_is_read_too(tiny_model_dir, tmp_path):
    """Files written before `quantization_config` carry `compression_config`: their integers must stay integers."""
    folder = tmp_path / "w8"
    compress(tiny_model_dir("llama"), folder, "W8A16")
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert "int8" in load_model(open_checkpoint(folder), "cpu", torch.float32).formats()
