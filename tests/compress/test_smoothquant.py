"""SmoothQuant: the paper's formula, outputs that stay, and less error where activations have outliers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.driver import compress, plan_compression
from powertrain.compress.smoothquant import smooth_scale
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]


def text(count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 320, (count, length), generator=generator).tolist()


def transformers_model(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_formula(alpha: float) -> None:
    inputs, weights = torch.tensor([1.0, 4.0, 64.0]), torch.tensor([0.5, 0.25, 2.0])
    found = smooth_scale(inputs, weights, alpha)
    for j in range(3):
        expected = float(inputs[j]) ** alpha / float(weights[j]) ** (1 - alpha)
        assert float(found[j]) == pytest.approx(expected, rel=1e-5)
    assert bool(torch.isfinite(smooth_scale(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), alpha)).all())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_norms_take_what_the_weights_get(tiny_model_dir: TinyModel, tmp_path: Path, family: str) -> None:
    calibration = text(6, 40, 1)
    recipe = {"steps": [{"method": "smoothquant", "alpha": 0.6}]}
    compress(tiny_model_dir(family), tmp_path / "out", recipe, calibration=calibration, length=40, dtype="float32")
    before, after = transformers_model(tiny_model_dir(family)), transformers_model(tmp_path / "out")
    ids = torch.tensor(calibration)
    seen: list[torch.Tensor] = []
    before.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-4)
    mlp = before.model.layers[1].mlp
    largest = torch.maximum(mlp.gate_proj.weight.detach().abs().amax(0), mlp.up_proj.weight.detach().abs().amax(0))
    scale = seen[0].abs().amax((0, 1)) ** 0.6 / largest**0.4
    norms = (model.model.layers[1].post_attention_layernorm.weight.detach() for model in (before, after))
    torch.testing.assert_close(next(norms) / scale, next(norms), rtol=1e-4, atol=1e-5)
    assert torch.equal(before.model.layers[1].mlp.down_proj.weight, after.model.layers[1].mlp.down_proj.weight)


def test_eight_bit_activations_bear_outliers_better(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_model_dir("llama").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for index in range(2):
        tensors[f"model.layers.{index}.input_layernorm.weight"][[3, 17]] *= 40
        tensors[f"model.layers.{index}.post_attention_layernorm.weight"][[5, 29]] *= 40
        for name, channels in (("self_attn.q_proj", [3, 17]), ("self_attn.k_proj", [3, 17]),
                               ("self_attn.v_proj", [3, 17]), ("mlp.gate_proj", [5, 29]),
                               ("mlp.up_proj", [5, 29])):  # fmt: skip
            tensors[f"model.layers.{index}.{name}.weight"][:, channels] /= 40
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    rounding = {"match": "Linear", "scheme": "W8A8"}
    compress(source, tmp_path / "plain", {"steps": [rounding]})
    recipe = {"steps": [{"method": "smoothquant"}, rounding]}
    compress(source, tmp_path / "smooth", recipe, calibration=text(16, 64, 1), length=64)
    held_out = [torch.tensor(ids) for ids in text(4, 64, 2)]
    models = [load_model(open_checkpoint(tmp_path / p), "cpu", torch.float32) for p in ("source", "plain", "smooth")]
    reference, plain, smooth = (torch.stack([model.score(ids) for ids in held_out]).double() for model in models)
    assert float((smooth - reference).norm()) < 0.7 * float((plain - reference).norm())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"alpha": 1.5}, r"steps\[0\]\.alpha must be a number from 0 to 1, got 1\.5"),
        ({"beta": 1}, r"steps\[0\]: unknown key 'beta'; the known ones are alpha"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_model_dir: TinyModel, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(PowertrainError, match=message):
        plan_compression(tiny_model_dir("llama"), {"steps": [{"method": "smoothquant", **entries}]})
