"""Checkpoints of 8-bit floats: written and read by the compressed-tensors library and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.compressed_tensors import scheme_of
from powertrain.checkpoint.float8 import Float8Scheme, float8_weight_tensors, fp8_scheme_of, load_float8_weight
from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.quantized import QuantizedMatrix, load_quantized, running_formats
from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.compress.floats import to_float8
from powertrain.kernels.quantized import dequantize_float8
from powertrain.model.decoder import Decoder
from powertrain.model.float8 import Float8Weight
from powertrain.types import ModelFileError
from quantized_builders import InMemory, Tensors, named, write_pair

IDS = torch.arange(80) * 13 % 300
LAYER = "model.layers.0.mlp.up_proj"
FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def library_scheme(strategy: str, has_activations: bool = True) -> QuantizationScheme:
    """The library's own presets: FP8_DYNAMIC, FP8_BLOCK, or the first with one scale for a matrix."""
    scheme = preset_name_to_scheme("FP8_BLOCK" if strategy == "block" else "FP8_DYNAMIC", ["Linear"])
    weights = scheme.weights.model_copy(update={"strategy": strategy})
    activations = scheme.input_activations if has_activations else None
    return scheme.model_copy(update={"weights": weights, "input_activations": activations})


def library_config(scheme: QuantizationScheme) -> dict[str, Any]:
    whole = QuantizationConfig(config_groups={"group_0": scheme}, format="float-quantized", ignore=["lm_head"])
    return whole.to_dict() | {"quantization_status": "compressed"}


def scales_for(weight: torch.Tensor, strategy: str) -> torch.Tensor:
    """absmax / 448 in the shapes that compressed-tensors stores."""
    rows, columns = weight.shape
    if strategy == "tensor":
        return weight.abs().amax().view(1) / 448
    if strategy == "channel":
        return weight.abs().amax(1, keepdim=True) / 448
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % 128, 0, -rows % 128))
    return padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).amax((1, 3)) / 448


def compress(weight: torch.Tensor, scheme: QuantizationScheme) -> tuple[Tensors, torch.Tensor]:
    """The library's tensors for a weight, and what it reads from them."""
    state = {"weight": weight, "weight_scale": scales_for(weight, scheme.weights.strategy)}
    tensors = FloatQuantizationCompressor.compress(state, scheme)
    return tensors, FloatQuantizationCompressor.decompress(tensors, scheme)["weight"]


def matrix_of(tensors: Tensors, config: dict[str, Any], shape: tuple[int, int]) -> QuantizedMatrix:
    checkpoint: Checkpoint = InMemory(named(LAYER, tensors), config)
    matrix = load_quantized(checkpoint, LAYER, shape)
    assert matrix is not None
    return matrix


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    strategy=st.sampled_from(["tensor", "channel", "block"]),
    has_activations=st.booleans(),
)
def test_what_the_library_wrote_is_read_as_it_reads_it(
    rows: int, columns: int, strategy: str, has_activations: bool
) -> None:
    scheme = library_scheme(strategy, has_activations)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    tensors, theirs = compress(weight, scheme)
    matrix = matrix_of(tensors, library_config(scheme), (rows, columns))
    assert torch.equal(matrix.weight.dequantize(), theirs)
    assert isinstance(matrix.weight, Float8Weight)
    assert matrix.weight.scale.ndim == (2 if strategy == "block" else 1)
    assert matrix.rounds_input == has_activations


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("shape", [(), (1,), (24,), (24, 1)])
def test_scales_of_one_and_per_output_may_have_one_dimension_less(strategy: Any, shape: tuple[int, ...]) -> None:
    scale = torch.rand(shape) + 0.5
    values = torch.randn(24, 40).to(FP8)
    checkpoint: Checkpoint = InMemory({"a.weight": values, "a.weight_scale": scale})
    scheme = Float8Scheme(strategy, rounds_input=False)
    if (scale.numel() == 1) != (strategy == "tensor"):
        with pytest.raises(ModelFileError, match=r"a\.weight_scale has shape"):
            load_float8_weight(checkpoint, "a", scheme, (24, 40))
        return
    ours = load_float8_weight(checkpoint, "a", scheme, (24, 40))
    assert torch.equal(ours.dequantize(), values.float() * (scale.view(-1, 1) if scale.numel() > 1 else scale))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_blocks_of_quant_method_fp8_are_read_as_the_library_reads_them(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows * columns)
    tensors = {
        "weight": torch.randn(rows, columns, generator=generator).to(FP8),
        "weight_scale_inv": (torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.1).to(dtype),
    }
    matrix = matrix_of(tensors, fp8_config(), (rows, columns))
    judge = FP8BlockDequantizer(dtype=torch.float32)
    assert torch.equal(matrix.weight.dequantize(), judge.process(named("a", tensors))["a.weight"])
    assert matrix.rounds_input


def fp8_config(**changes: Any) -> dict[str, Any]:
    sound = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return sound | changes


def fp8_layer(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = scales_for(weight, "block")
    rows, columns = weight.shape
    spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    values = (weight / spread).to(FP8)
    return {"weight": values, "weight_scale_inv": scale}, dequantize_float8(values, scale)


def whole(decoder: Decoder) -> list[torch.Tensor]:
    return [torch.cat([fmt.unpack() for fmt in linear.formats]) for linear in decoder.linears()]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_reads_a_folder_of_quant_method_fp8_to_the_same_weights(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    import transformers

    manifest = fp8_config(modules_to_not_convert=["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.down_proj"])
    kept = ("lm_head", "layers.1.mlp.down_proj")
    quantized, _ = write_pair(tiny_model_dir(family), tmp_path, manifest, fp8_layer, kept)
    ours = load_model(open_checkpoint(quantized), "cpu", torch.float32)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)
    assert ours.formats() == ["float32", "fp8 block a8"]
    expected = []
    for layer in theirs.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        expected.append(torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]))
        expected += [attention.o_proj.weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])]
        expected.append(mlp.down_proj.weight)
    for one, other in zip(whole(ours)[: len(expected)], expected, strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        logits = theirs(IDS[None]).logits[0]
    plain = load_model(open_checkpoint(tiny_model_dir(family)), "cpu", torch.float32).score(IDS)
    # they do not round the input on a CPU
    assert (ours.score(IDS) - logits).abs().mean() < 1.5 * (plain - logits).abs().mean()


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_a_folder_gives_the_logits_of_the_weights_it_means(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, strategy: str
) -> None:
    scheme = library_scheme(strategy, has_activations=False)
    quantized, dense = write_pair(
        tiny_model_dir("llama3"), tmp_path, library_config(scheme), lambda layer, weight: compress(weight, scheme)
    )
    model = load_model(open_checkpoint(quantized), "cpu", torch.float32)
    expected = load_model(open_checkpoint(dense), "cpu", torch.float32).score(IDS)
    assert (model.score(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert "fp8 block" in model.formats() if strategy == "block" else "fp8" in model.formats()
    # blocks of 128 outputs do not stay whole over q, k and v of this width
    assert len(model.blocks[0].attention.qkv.formats) == (3 if strategy == "block" else 1)


def test_transformers_runs_dynamic_activations_to_the_same_logits(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    import transformers

    scheme = library_scheme("channel")
    quantized, dense = write_pair(
        tiny_model_dir("llama"), tmp_path, library_config(scheme), lambda layer, weight: compress(weight, scheme)
    )
    model = load_model(open_checkpoint(quantized), "cpu", torch.float32)
    assert model.formats() == ["float32", "fp8 a8"]
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    unrounded = load_model(open_checkpoint(dense), "cpu", torch.float32).score(IDS)
    # a rounding step that falls the other way moves a logit by far less than rounding all inputs does
    assert (model.score(IDS) - expected).abs().mean() < 0.25 * (unrounded - expected).abs().mean()


def static_scheme(strategy: str) -> QuantizationScheme:
    """The library's FP8, whose inputs have one scale in the file; weights with one for each output are common too."""
    scheme = preset_name_to_scheme("FP8", ["Linear"])
    return scheme.model_copy(update={"weights": scheme.weights.model_copy(update={"strategy": strategy})})


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("shape", [(1,), ()])
def test_static_input_scales_round_as_the_library_does(strategy: str, shape: tuple[int, ...]) -> None:
    scheme = static_scheme(strategy)
    generator = torch.Generator().manual_seed(0)
    tensors, decoded = compress(torch.randn(24, 40, generator=generator), scheme)
    x = torch.randn(50, 40, generator=generator)
    # half of the largest input, so that some are cut
    scale = (x.abs().amax() / 896).view(shape)
    matrix = matrix_of(tensors | {"input_scale": scale}, library_config(scheme), (24, 40))
    (fmt,) = running_formats([matrix], CPU)
    module = torch.nn.Linear(40, 24)
    module.quantization_status = QuantizationStatus.COMPRESSED
    module.input_scale = torch.nn.Parameter(scale.view(1), requires_grad=False)
    rounded = forward_quantize(module, x, "input", scheme.input_activations)
    assert (rounded - x).abs().max() > 0.5
    torch.testing.assert_close(fmt.matmul(x), rounded @ decoded.t())
    assert (fmt.name, fmt.nbytes(), fmt.out_features) == ("fp8 a8 static", 24 * 44, 24)
    assert torch.equal(fmt.unpack(), decoded)


def test_products_are_one_where_their_inputs_scales_agree() -> None:
    values = torch.ones(8, 40).to(FP8)
    parts = [QuantizedMatrix(Float8Weight(values, torch.ones(8)), True, input_scale=scale) for scale in (0.5, 0.5, 2.0)]
    assert [fmt.out_features for fmt in running_formats(parts[:2], CPU)] == [16]
    assert [fmt.out_features for fmt in running_formats(parts, CPU)] == [8, 8, 8]


def test_transformers_runs_a_folder_of_static_input_scales_to_the_same_logits(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    import transformers

    scheme = static_scheme("tensor")

    def quantize(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rounded, _ = to_float8(weight, "tensor", name=layer)
        tensors = float8_weight_tensors("a", rounded, "tensor", input_scale=0.02)
        return {name.removeprefix("a."): tensor for name, tensor in tensors.items()}, rounded.dequantize()

    quantized, dense = write_pair(tiny_model_dir("llama"), tmp_path, library_config(scheme), quantize)
    model = load_model(open_checkpoint(quantized), "cpu", torch.float32)
    assert model.formats() == ["float32", "fp8 a8 static"]
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(IDS[None]).logits[0]
    unrounded = load_model(open_checkpoint(dense), "cpu", torch.float32).score(IDS)
    assert (model.score(IDS) - expected).abs().mean() < 0.25 * (unrounded - expected).abs().mean()


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (None, "no tensor named .*input_scale"),
        (torch.zeros(1), "input_scale is 0.0, expected a positive number"),
        (torch.tensor(float("inf")), "input_scale is inf"),
        (torch.ones(2), r"input_scale has shape \[2\]"),
        (torch.ones(1, dtype=torch.int32), "input_scale is torch.int32"),
    ],
)
def test_static_input_scales_that_cannot_be_are_refused(scale: torch.Tensor | None, message: str) -> None:
    tensors, _ = compress(torch.randn(24, 40), static_scheme("tensor"))
    if scale is not None:
        tensors["input_scale"] = scale
    with pytest.raises(ModelFileError, match=message):
        matrix_of(tensors, library_config(static_scheme("tensor")), (24, 40))


def test_blocks_that_stay_whole_are_one_product() -> None:
    def matrix(rows: int, seed: int, rounds_input: bool = True) -> QuantizedMatrix:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(rows, 200, generator=generator).to(FP8)
        scale = torch.rand(-(-rows // 128), 2, generator=generator)
        return QuantizedMatrix(Float8Weight(values, scale), rounds_input)

    parts = [matrix(256, 0), matrix(128, 1), matrix(40, 2)]
    (fmt,) = running_formats(parts, CPU)
    assert torch.equal(fmt.unpack(), torch.cat([part.weight.dequantize() for part in parts]))
    assert len(running_formats([parts[2], parts[0]], CPU)) == 2
    apart = running_formats([parts[0], matrix(128, 3, rounds_input=False)], CPU)
    assert [one.name for one in apart] == ["fp8 block a8", "fp8 block"]


@pytest.mark.parametrize(
    ("entries", "layer", "is_kept"),
    [
        (["lm_head"], "lm_head", True),
        (["model.layers.0.mlp.gate"], "model.layers.0.mlp.gate_proj", False),
        (["gate_proj"], "model.layers.0.mlp.gate_proj", True),
        (["mlp"], "model.layers.0.mlp.gate_proj", True),
        (["model.layers.1"], "model.layers.11.mlp.gate_proj", False),
        (["model.layers.1"], "model.layers.1.mlp.gate_proj", True),
        ([r"model\.layers\.\d+\.self_attn"], "model.layers.7.self_attn.q_proj", True),
        ([r"model.layers.*.mlp.gate"], "model.layers.7.mlp.gate_proj", False),
    ],
)
def test_lists_of_modules_name_whole_parts(entries: list[str], layer: str, is_kept: bool) -> None:
    for key in ("modules_to_not_convert", "ignored_layers"):
        assert (fp8_scheme_of(fp8_config(**{key: entries}), layer, has_head_scale=True) is None) == is_kept


def test_the_head_is_quantized_where_it_has_scales() -> None:
    assert fp8_scheme_of(fp8_config(), "lm_head", has_head_scale=False) is None
    assert fp8_scheme_of(fp8_config(), "lm_head", has_head_scale=True) is not None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"activation_scheme": "static"}, "activation_scheme 'static' cannot be run; dynamic can"),
    ({"fmt": "e5m2"}, "fmt 'e5m2'"),
    ({"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
    ({"weight_block_size": [64, 128]}, r"weight_block_size \[64, 128\]"),
    ({"weight_block_size": None}, "weight_block_size None"),
    ({"modules_to_convert": ["model.embed_tokens"]}, "modules_to_convert: layers"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is not a list"),
    ({"modules_to_not_convert": ["("]}, "modules_to_not_convert holds no regular expression"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_configs_that_cannot_be_run_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    tensors, _ = fp8_layer(LAYER, torch.randn(24, 40))
    with pytest.raises(ModelFileError, match=message):
        matrix_of(tensors, fp8_config(**changes), (24, 40))


LIBRARY_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("weights", {"type": "int"}, "'float-quantized' can be run with static symmetric float weights"),
    ("weights", {"num_bits": 4}, "'float-quantized' can be run with static symmetric float weights"),
    ("weights", {"symmetric": False}, "'float-quantized' can be run with static symmetric float weights"),
    ("weights", {"strategy": "group", "group_size": 128}, "strategy 'group' cannot be run for 8-bit floats"),
    ("weights", {"strategy": "block", "block_structure": [64, 64]}, r"block_structure \[64, 64\]"),
    ("weights", {"strategy": "block", "block_structure": [128, 128]}, "beside block scales only .* per group of 128"),
    (
        "input_activations",
        {"dynamic": False},
        "static input scales can be run with strategy tensor, beside weights not",
    ),
    ("input_activations", {"dynamic": "local"}, "beside channel scales only symmetric float of 8 bits, per token"),
    ("input_activations", {"type": "int"}, "beside channel scales only symmetric float of 8 bits, per token"),
    ("input_activations", {"strategy": "tensor"}, "beside channel scales only"),
    ("input_activations", {"strategy": "group", "group_size": 128}, "beside channel scales only"),
]


@pytest.mark.parametrize(("part", "changes", "message"), LIBRARY_REFUSED)
def test_library_schemes_that_cannot_be_run_are_refused_by_name(
    part: str, changes: dict[str, Any], message: str
) -> None:
    config = library_config(library_scheme("channel"))
    config["config_groups"]["group_0"][part] |= changes
    with pytest.raises(ModelFileError, match=message):
        scheme_of({"quantization_config": config}, LAYER)


DAMAGE: list[tuple[str, torch.Tensor | None, str]] = [
    ("weight", None, r"no tensor named .*up_proj\.weight"),
    ("weight", torch.zeros(24, 39).to(FP8), r"weight has shape \[24, 39\], expected float8_e4m3fn \[24, 40\]"),
    ("weight", torch.zeros(24, 40), "weight is torch.float32"),
    ("weight", torch.zeros(24, 40).to(torch.float8_e5m2), "weight is torch.float8_e5m2"),
    ("weight_scale_inv", None, "weight_scale_inv"),
    ("weight_scale_inv", torch.ones(24, 1), r"weight_scale_inv has shape \[24, 1\], expected \[1, 1\]"),
    ("weight_scale_inv", torch.ones(1, 1, dtype=torch.uint8), "weight_scale_inv is torch.uint8"),
]


@pytest.mark.parametrize(("suffix", "tensor", "message"), DAMAGE)
def test_tensors_that_do_not_fit_are_refused(suffix: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors, _ = fp8_layer(LAYER, torch.randn(24, 40))
    if tensor is None:
        del tensors[suffix]
    else:
        tensors[suffix] = tensor
    with pytest.raises(ModelFileError, match=message):
        matrix_of(tensors, fp8_config(), (24, 40))
