"""W8A8 and W4A8: written, read and computed as the compressed-tensors library and transformers do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.compressed_tensors import (
    int_weight_tensors,
    load_int_weight,
    quantization_config,
    scheme_of,
    stored_format,
)
from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress import compress
from powertrain.compress.driver import plan_compression
from powertrain.compress.recipe import SCHEMES, load_recipe
from powertrain.model.packed import int_part, pack
from powertrain.model.quantized_input import round_to_int8
from powertrain.model.weights import IntWeight
from powertrain.types import ModelFileError, PowertrainError, QuantScheme

W8A8 = QuantScheme(num_bits=8, activation_bits=8)
W8A8_ASYM = QuantScheme(num_bits=8, symmetric=False, activation_bits=8)
W4A8 = QuantScheme(num_bits=4, group_size=32, activation_bits=8)
W4A8_GROUPS = QuantScheme(num_bits=4, group_size=32, activation_bits=8, activation_group_size=32)
BOTH = [W8A8, W8A8_ASYM, W4A8, W4A8_GROUPS]

RECIPES: dict[str, Any] = {
    "W8A8": "W8A8",
    "W4A8": {"steps": [{"match": "Linear", "scheme": "W4A8", "group_size": 32}]},
    "mixed": {
        "steps": [
            {"match": "re:.*_proj", "ignore": "re:.*down_proj", "scheme": "W8A8"},
            {"match": "re:.*down_proj", "scheme": "W4A16", "group_size": 32},
        ]
    },
}


def groups_of(scheme: QuantScheme) -> Any:
    config = quantization_config([(scheme, ["Linear"])], ["lm_head"])
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


@pytest.mark.parametrize("scheme", BOTH)
def test_the_library_reads_our_config_and_would_store_the_same_format(scheme: QuantScheme) -> None:
    theirs = groups_of(scheme)
    assert theirs.input_activations.num_bits == 8
    assert theirs.input_activations.dynamic is True
    assert theirs.input_activations.symmetric
    expected = QuantizationStrategy.GROUP if scheme.activation_group_size else QuantizationStrategy.TOKEN
    assert theirs.input_activations.strategy == expected
    assert theirs.format == infer_module_format(torch.nn.Linear, theirs) == stored_format(scheme)
    config = {"quantization_config": quantization_config([(scheme, ["Linear"])], ["lm_head"])}
    assert scheme_of(config, "model.layers.0.mlp.up_proj") == scheme
    assert scheme_of(config, "lm_head") is None


@pytest.mark.parametrize("name", ["W8A8", "W4A8"])
def test_our_presets_are_theirs(name: str) -> None:
    ours, theirs = groups_of(SCHEMES[name]), preset_name_to_scheme(name, ["Linear"])
    assert ours.weights.num_bits == theirs.weights.num_bits
    assert ours.weights.strategy == theirs.weights.strategy
    assert ours.weights.symmetric == theirs.weights.symmetric
    kinds = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    assert all(getattr(ours.input_activations, key) == getattr(theirs.input_activations, key) for key in kinds)
    channel = load_recipe({"steps": [{"match": "Linear", "scheme": name, "group_size": "channel"}]}).steps[0].scheme
    assert channel == QuantScheme(num_bits=SCHEMES[name].num_bits, activation_bits=8)


@pytest.mark.parametrize("scheme", BOTH)
def test_the_library_decodes_our_integers_and_we_read_them_back(tmp_path: Path, scheme: QuantScheme) -> None:
    generator = torch.Generator().manual_seed(3)
    low, high = -(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1)
    groups = 1 if scheme.group_size is None else 3
    zero = torch.randint(low, high, (24, groups), dtype=torch.int8, generator=generator)
    weight = IntWeight(
        torch.randint(low, high, (24, 96), dtype=torch.int8, generator=generator),
        torch.rand(24, groups, generator=generator) + 0.01,
        None if scheme.symmetric else zero,
        scheme.num_bits,
    )
    tensors = int_weight_tensors("a", weight, stored_format(scheme))
    state = {name.removeprefix("a."): tensor for name, tensor in tensors.items()}
    theirs: Any = BaseCompressor.get_value_from_registry(stored_format(scheme))
    assert torch.equal(theirs.decompress(state, groups_of(scheme))["weight"], weight.dequantize())
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", {}, tensors.items()))
    ours = load_int_weight(checkpoint, "a", scheme)
    assert torch.equal(ours.dequantize(), weight.dequantize())
    assert pack([int_part(ours, quantizes_activations=True)])[1].quantizes_activations


def test_integers_beyond_their_bits_are_refused(tmp_path: Path) -> None:
    weight = IntWeight(torch.full((16, 32), 8, dtype=torch.int8), torch.ones(16, 1), None, 4)
    out = write_checkpoint(tmp_path / "m", {}, int_weight_tensors("a", weight, stored_format(W4A8)).items())
    with pytest.raises(ModelFileError, match=r"a\.weight holds integers beyond 4 bits"):
        load_int_weight(open_checkpoint(out), "a", W4A8)


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([None, 32]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_inputs_are_rounded_as_the_library_rounds_them(rows: int, blocks: int, group: int | None, seed: int) -> None:
    x = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    scheme = QuantScheme(num_bits=4, group_size=32, activation_bits=8, activation_group_size=group)
    args = groups_of(scheme).input_activations
    batch = x[None]  # a token is the second of three dimensions there
    scale, zero_point = compute_dynamic_scales_and_zp(batch, args, torch.nn.Linear(1, 1))
    expected = fake_quantize(batch, scale, zero_point, args)[0]
    assert torch.allclose(round_to_int8(x, group), expected, rtol=1e-6, atol=0)


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(round_to_int8(torch.zeros(2, 64)), torch.zeros(2, 64))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_runs_the_compressed_model_to_the_same_logits(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, family: str, recipe: Any
) -> None:
    import transformers

    out = tmp_path / "out"
    planned = plan_compression(tiny_model_dir(family), recipe, dtype="float32").nbytes
    report = compress(tiny_model_dir(family), out, recipe, dtype="float32")
    checkpoint = open_checkpoint(out)
    assert planned == report.nbytes == sum(checkpoint.nbytes(name) for name in checkpoint.names())
    ids = torch.arange(80) * 13 % 300  # more rows than torch's products in bfloat16 take
    model = load_model(checkpoint, "cpu", torch.float32)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    assert expected.std() > 0.1
    plain = load_model(open_checkpoint(tiny_model_dir(family)), "cpu", torch.float32).score(ids)
    # a rounding step that falls the other way moves a logit by far less than quantization itself does
    assert (model.score(ids) - expected).abs().mean() < 0.25 * (plain - expected).abs().mean()
    assert any(name.endswith("a8") for name in model.formats())


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_bits": 4},
        {"type": "float"},
        {"symmetric": False},
        {"dynamic": False},
        {"dynamic": "local"},
        {"strategy": "tensor"},
        {"strategy": "group", "group_size": None},
        {"strategy": "group", "group_size": 0},
    ],
)
def test_other_activation_schemes_are_refused(wrong: dict[str, Any]) -> None:
    config = quantization_config([(W8A8, ["Linear"])], [])
    config["config_groups"]["group_0"]["input_activations"] |= wrong
    with pytest.raises(ModelFileError, match="input_activations: only dynamic symmetric int of 8 bits"):
        scheme_of({"quantization_config": config}, "a")


def test_other_activation_bits_mean_nothing() -> None:
    with pytest.raises(PowertrainError, match="activation_bits must be 8"):
        QuantScheme(num_bits=8, activation_bits=4)
