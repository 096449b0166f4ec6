"""Recipes of floats: whole folders, judged by compressed-tensors' own decoding and by the engine."""

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
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
PRESETS = ("FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16")
ALLOWED = {"FP8_DYNAMIC": 0.03, "FP8_BLOCK": 0.03, "NVFP4A16": 0.1, "MXFP4A16": 0.13}


@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_folder_holds_what_the_plan_said_and_runs(
    tiny_model_dir: TinyModel, tmp_path: Path, preset: str, observer: str
) -> None:
    source, recipe = tiny_model_dir("llama3"), {"steps": [{"match": "Linear", "scheme": preset, "observer": observer}]}
    plan = plan_compression(source, recipe, dtype="float32")
    report = compress(source, tmp_path / "out", recipe, dtype="float32")
    assert report.nbytes == plan.nbytes
    made, original = open_checkpoint(tmp_path / "out"), open_checkpoint(source)
    name = "model.layers.1.mlp.down_proj"
    weight = original.load(f"{name}.weight").float()
    stored = load_quantized(made, name, tuple(weight.shape))
    assert stored is not None
    assert (stored.weight.dequantize() - weight).norm() / weight.norm() < ALLOWED[preset]
    ids = torch.randint(5, 300, (40,), generator=torch.Generator().manual_seed(0))
    ours, theirs = (load_model(one, "cpu", torch.float32).score(ids).log_softmax(-1) for one in (made, original))
    assert (theirs.exp() * (theirs - ours)).sum(-1).mean() < 60 * ALLOWED[preset] ** 2


@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "NVFP4A16", "MXFP4A16"])
def test_compressed_tensors_decodes_the_folder(tiny_model_dir: TinyModel, tmp_path: Path, preset: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    compress(tiny_model_dir("qwen3"), tmp_path / "out", preset, dtype="float32")
    made = open_checkpoint(tmp_path / "out")
    config = QuantizationConfig.model_validate(made.config["quantization_config"])
    [scheme] = config.config_groups.values()
    compressor: Any = BaseCompressor.get_value_from_registry(scheme.format)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj"):
        tensors = {n.rsplit(".", 1)[-1]: made.load(n) for n in made.names() if n.startswith(f"{name}.")}
        theirs = compressor.decompress(tensors, scheme)["weight"].bfloat16()
        ours = load_quantized(made, name, tuple(theirs.shape))
        assert ours is not None
        assert torch.equal(ours.weight.dequantize().bfloat16(), theirs)


@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "NVFP4A16", "MXFP4A16", "W8A8", "W4A8"])
def test_transformers_runs_the_folder(tiny_model_dir: TinyModel, tmp_path: Path, preset: str) -> None:
    import transformers

    step: dict[str, Any] = {"match": "Linear", "scheme": preset}
    recipe = {"steps": [{**step, "group_size": 32} if preset == "W4A8" else step]}
    compress(tiny_model_dir("llama3"), tmp_path / "out", recipe, dtype="bfloat16")
    # the library decodes 4-bit floats in bfloat16 and then multiplies in nothing else
    dtype = torch.bfloat16 if "FP4" in preset else torch.float32
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    ids = torch.randint(5, 300, (100,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.eval()(ids.unsqueeze(0)).logits[0].float()
    found = load_model(open_checkpoint(tmp_path / "out"), "cpu", dtype).score(ids)
    original = load_model(open_checkpoint(tiny_model_dir("llama3")), "cpu", torch.float32).score(ids)
    # activations fall either way at ties, and bfloat16 rounds: by far less than the weights were changed
    assert (found - expected).norm() < 0.2 * (original - expected).norm()


def test_matrices_of_one_product_share_their_divisor(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    compress(tiny_model_dir("llama"), tmp_path / "out", "NVFP4A16")
    made, prefix = open_checkpoint(tmp_path / "out"), "model.layers.0.self_attn"
    divisors = [made.load(f"{prefix}.{name}_proj.weight_global_scale") for name in "qkvo"]
    assert torch.equal(divisors[0], divisors[1])
    assert torch.equal(divisors[0], divisors[2])
    assert not torch.equal(divisors[0], divisors[3])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"scheme": "FP8_DYNAMIC", "group_size": 64}, r"steps\[0\].group_size: FP8_DYNAMIC has groups of its own"),
        ({"scheme": "NVFP4A16", "method": "autoround"}, r"method: autoround rounds to integers, NVFP4A16 has floats"),
    ],
)
def test_what_floats_do_not_have_is_refused(tiny_model_dir: TinyModel, step: dict[str, Any], message: str) -> None:
    with pytest.raises(PowertrainError, match=message):
        plan_compression(tiny_model_dir("llama"), {"steps": [{"match": "Linear", **step}]})
