"""Checkpoints of 4-bit floats and the presets of floats, judged by the compressed-tensors library, and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.compressed_tensors import scheme_of
from powertrain.checkpoint.float4 import Float4Scheme, float4_weight_tensors, load_float4_weight
from powertrain.checkpoint.float8 import Float8Scheme, float8_weight_tensors
from powertrain.checkpoint.float_presets import FLOAT_PRESETS, float_group
from powertrain.checkpoint.load import load_decoder, load_model
from powertrain.checkpoint.quantized import QuantizedMatrix, load_quantized, running_formats
from powertrain.checkpoint.safetensors_folder import SafetensorsCheckpoint, write_checkpoint
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.floats import to_float8, to_mxfp4, to_nvfp4
from powertrain.config import EngineConfig, resolve
from powertrain.kernels import native
from powertrain.kernels.float4 import unpack_float4
from powertrain.model.float4 import Float4, Float4Weight, concat_float4_weights
from powertrain.model.weights import Dense
from powertrain.types import ModelFileError, PowertrainError
from quantized_builders import InMemory, Tensors, named, write_pair

IDS = torch.arange(80) * 13 % 300
LAYER = "model.layers.0.mlp.up_proj"
CPU = torch.device("cpu")
KINDS = ["NVFP4A16", "MXFP4A16"]
COMPRESSORS = {"NVFP4A16": NVFP4PackedCompressor, "MXFP4A16": MXFP4PackedCompressor}
SCHEMES = {"NVFP4A16": Float4Scheme(16), "MXFP4A16": Float4Scheme(32)}


def manifest(preset: str, **changes: Any) -> dict[str, Any]:
    """As `powertrain compress` would write it; `changes` go into the one group."""
    group = float_group(preset, ["Linear"]) | changes
    return {
        "quant_method": "compressed-tensors",
        "format": group["format"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def library_scheme(preset: str) -> QuantizationScheme:
    return preset_name_to_scheme(preset, ["Linear"])


def every_code(preset: str, rows: int = 16, groups: int = 3, seed: int = 0) -> Float4Weight:
    """Every byte and every finite scale of both signs that the format has, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    size = SCHEMES[preset].group_size

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.uint8)

    packed = draw(256, rows, groups * size // 2)
    if preset == "MXFP4A16":
        # 2^124 times 6 is the largest that does not overflow bfloat16, in which the library decodes
        return Float4Weight(packed, draw(252, rows, groups), None)
    return Float4Weight(packed, draw(127, rows, groups).view(torch.float8_e4m3fn), torch.tensor([1234.5]))


def local(tensors: Tensors, prefix: str = "a") -> Tensors:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}


def written(tensors: Tensors, config: dict[str, Any], out: Path) -> SafetensorsCheckpoint:
    return SafetensorsCheckpoint(write_checkpoint(out, {"quantization_config": config}, tensors.items()))


@pytest.mark.parametrize("preset", FLOAT_PRESETS)
def test_groups_are_the_librarys_presets(preset: str) -> None:
    ours = QuantizationScheme.model_validate(float_group(preset, ["re:.*up_proj$"]))
    theirs = preset_name_to_scheme(preset, ["re:.*up_proj$"])
    assert ours.model_dump() | {"format": None} == theirs.model_dump()
    whole = QuantizationConfig.model_validate(manifest(preset))
    saved = whole.to_dict()["config_groups"]["group_0"]
    # what the library itself would save, but for keys that say nothing
    assert saved == float_group(preset, ["Linear"])
    assert whole.config_groups["group_0"].format == float_group(preset, [])["format"]


def test_groups_are_copies_and_other_names_are_refused() -> None:
    float_group("FP8_BLOCK", ["Linear"])["weights"]["block_structure"].append(1)
    assert float_group("FP8_BLOCK", ["Linear"])["weights"]["block_structure"] == [128, 128]
    assert float_group("FP8_DYNAMIC", ["Linear"], rounds_input=False)["input_activations"] is None
    with pytest.raises(PowertrainError, match="'NVFP4' is unknown; the known ones of floats are FP8, "):
        float_group("NVFP4", ["Linear"])


@settings(max_examples=30, deadline=None)
@given(preset=st.sampled_from(KINDS), rows=st.integers(1, 9), groups=st.integers(1, 4), seed=st.integers(0, 999))
def test_the_library_decodes_our_tensors_to_the_same_floats(preset: str, rows: int, groups: int, seed: int) -> None:
    weight = every_code(preset, rows, groups, seed)
    tensors = float4_weight_tensors("a", weight)
    theirs = COMPRESSORS[preset].decompress(local(tensors), library_scheme(preset))["weight"]
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(weight.dequantize(torch.bfloat16), theirs)


@pytest.mark.parametrize("preset", KINDS)
@pytest.mark.parametrize("shape", [(24, 64), (7, 32), (1, 96)])
def test_we_decode_what_the_library_wrote(tmp_path: Path, preset: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    scheme = library_scheme(preset)
    groups = weight.unflatten(1, (-1, scheme.weights.group_size)).abs().amax(-1)
    state = {"weight": weight, "weight_scale": torch.exp2(groups.log2().floor() - 2)}
    if preset == "NVFP4A16":
        divisor = 2688 / weight.abs().amax().view(1)
        state["weight_scale"] = (groups / 6 * divisor).to(torch.float8_e4m3fn).float()
        state["weight_global_scale"] = divisor
    tensors = COMPRESSORS[preset].compress(state, scheme)
    whole = QuantizationConfig(config_groups={"group_0": scheme}, format=float_group(preset, [])["format"])
    config = whole.to_dict() | {"quantization_status": "compressed"}
    checkpoint = written(named(LAYER, tensors), config, tmp_path / "m")
    matrix = load_quantized(checkpoint, LAYER, shape)
    assert matrix is not None
    assert scheme_of(checkpoint.config, LAYER) == SCHEMES[preset]
    theirs = COMPRESSORS[preset].decompress(tensors, scheme)["weight"]
    assert torch.equal(matrix.weight.dequantize(torch.bfloat16), theirs)


@pytest.mark.parametrize("preset", KINDS)
def test_what_is_written_is_read_back(tmp_path: Path, preset: str) -> None:
    weight = every_code(preset)
    checkpoint = written(float4_weight_tensors("a", weight), manifest(preset), tmp_path / "m")
    shape = tuple(unpack_float4(weight.packed).shape)
    found = load_float4_weight(checkpoint, "a", SCHEMES[preset], shape)
    assert found.kind == weight.kind
    assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs(found, weight))


def pairs(one: Float4Weight, other: Float4Weight) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]


def test_every_exponent_of_mxfp4_is_the_librarys_in_float32() -> None:
    """bfloat16, which the library decodes in, holds them all too; 6 times the last ones does not fit any float."""
    exponents = torch.arange(252, dtype=torch.uint8).view(1, -1)
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes | codes << 4).repeat(252).view(1, -1)
    weight = Float4Weight(packed, exponents, None)
    ours = weight.dequantize()
    theirs = MXFP4PackedCompressor.decompress(local(float4_weight_tensors("a", weight)), library_scheme("MXFP4A16"))
    assert torch.equal(ours, theirs["weight"].float())
    integers = weight.as_integers()
    assert integers is not None
    # half of the smallest power is below what float32 holds exactly times 12
    assert torch.equal(integers.dequantize()[:, 32:], ours[:, 32:])


def test_stacked_matrices_keep_their_numbers() -> None:
    for preset in KINDS:
        parts = [every_code(preset, rows, 2, rows) for rows in (8, 3, 5)]
        if preset == "NVFP4A16":
            parts = [one._replace(global_scale=torch.tensor([37.0 + n])) for n, one in enumerate(parts)]
        whole = concat_float4_weights(parts)
        expected = torch.cat([one.dequantize() for one in parts])
        assert torch.equal(whole.dequantize(), expected)
        again = concat_float4_weights([whole, parts[0]])
        assert torch.equal(again.dequantize(), torch.cat([expected, parts[0].dequantize()]))
        (fmt,) = running_formats([QuantizedMatrix(one) for one in parts], CPU)
        assert torch.equal(fmt.unpack(), expected)
    with pytest.raises(ValueError, match="no one global scale"):
        float4_weight_tensors("a", concat_float4_weights([every_code("NVFP4A16"), every_code("NVFP4A16")]))
    mixed = [QuantizedMatrix(every_code("NVFP4A16", 8, 2)), QuantizedMatrix(every_code("MXFP4A16", 8, 1))]
    assert [fmt.name for fmt in running_formats(mixed, CPU)] == ["nvfp4 as float32", "mxfp4 as float32"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [to_nvfp4, to_mxfp4])
def test_formats_multiply_and_say_what_they_hold(quantize: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, _ = quantize(torch.randn(24, 64, generator=generator), True)
    x = torch.randn(5, 64, generator=generator).to(dtype)
    expected = x @ weight.dequantize(dtype).t()
    packed, widened = Float4(weight), Float4.pack(weight, CPU, dtype)
    assert torch.equal(packed.matmul(x), expected)
    torch.testing.assert_close(widened.matmul(x), expected)
    assert (packed.name, packed.out_features) == (weight.kind, 24)
    bits = 4.5 if weight.kind == "nvfp4" else 4.25
    divisor = 4 if weight.kind == "nvfp4" else 0
    assert packed.nbytes() == packed.step_bytes() == 24 * 64 * bits / 8 + divisor
    assert widened.nbytes() == widened.step_bytes() == 24 * 64 * dtype.itemsize
    assert widened.name == f"{weight.kind} as {str(dtype).removeprefix('torch.')}"
    assert torch.equal(packed.unpack().to(dtype), widened.unpack())


FOUR_BITS = {"NVFP4A16": to_nvfp4, "MXFP4A16": to_mxfp4}


def quantize_layer(preset: str) -> Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]:
    """Rounded by us, decoded by the library."""
    scheme = library_scheme(preset)

    def quantize(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        if preset in FOUR_BITS:
            rounded, _ = FOUR_BITS[preset](weight, True, name=layer)
            tensors = local(float4_weight_tensors("a", rounded))
            # the library decodes in bfloat16, so its floats are only compared, not run
            theirs = COMPRESSORS[preset].decompress(tensors, scheme)["weight"]
            assert torch.equal(rounded.dequantize(torch.bfloat16), theirs)
            return tensors, rounded.dequantize()
        strategy: Any = scheme.weights.strategy
        eight, _ = to_float8(weight, strategy, name=layer)
        tensors = local(float8_weight_tensors("a", eight, strategy))
        decoded = FloatQuantizationCompressor.decompress(tensors, scheme)["weight"]
        assert torch.equal(decoded, eight.dequantize())
        return tensors, decoded

    return quantize


@pytest.mark.parametrize("preset", FLOAT_PRESETS)
def test_a_folder_gives_the_logits_of_the_weights_it_means(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, preset: str
) -> None:
    config = manifest(preset, input_activations=None)
    quantized, dense = write_pair(tiny_model_dir("llama3"), tmp_path, config, quantize_layer(preset))
    model = load_model(open_checkpoint(quantized), "cpu", torch.float32)
    expected = load_model(open_checkpoint(dense), "cpu", torch.float32).score(IDS)
    assert (model.score(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()
    name = {"NVFP4A16": "nvfp4 as float32", "MXFP4A16": "mxfp4 as float32", "FP8_BLOCK": "fp8 block"}.get(preset, "fp8")
    assert model.formats() == sorted(["float32", name])
    assert len(model.blocks[0].attention.qkv.formats) == (3 if preset == "FP8_BLOCK" else 1)


FORMATS = {"NVFP4A16": ["float32"], "MXFP4A16": ["float32", "int8 g32"]}


@pytest.mark.skipif(native.load() is None, reason="no native kernels here")
@pytest.mark.parametrize("preset", KINDS)
def test_the_native_kernels_give_the_logits_of_the_weights_it_means(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, dense = write_pair(tiny_model_dir("llama3"), tmp_path, manifest(preset), quantize_layer(preset))
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))
    options = resolve(EngineConfig.from_options(device="cpu", kernels="native"), has_cuda=False, model_dtype="float32")
    model, plain = (load_decoder(open_checkpoint(folder), options) for folder in (quantized, dense))
    assert model.formats() == FORMATS[preset]
    expected = plain.score(IDS)
    assert (model.score(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_presets_say_what_runs() -> None:
    found = {preset: scheme_of({"quantization_config": manifest(preset)}, LAYER) for preset in FLOAT_PRESETS}
    assert found == {
        "FP8": Float8Scheme("tensor", True, has_input_scale=True),
        "FP8_DYNAMIC": Float8Scheme("channel", True),
        "FP8_BLOCK": Float8Scheme("block", True),
        **SCHEMES,
    }
    assert scheme_of({"quantization_config": manifest("NVFP4A16")}, "lm_head") is None


@pytest.mark.parametrize("preset", ["NVFP4", "MXFP4", "MXFP4XFP8"])
def test_rounded_inputs_are_refused_by_name(preset: str) -> None:
    group = library_scheme(preset).model_dump()
    config = manifest("NVFP4A16" if preset == "NVFP4" else "MXFP4A16", input_activations=group["input_activations"])
    with pytest.raises(ModelFileError, match="input_activations: beside 4-bit float weights only inputs that are not"):
        scheme_of({"quantization_config": config}, LAYER)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_bits": 8}, "static symmetric float weights of 4 bits only"),
    ({"type": "int"}, "static symmetric float weights of 4 bits only"),
    ({"symmetric": False}, "static symmetric float weights of 4 bits only"),
    ({"dynamic": True}, "static symmetric float weights of 4 bits only"),
    ({"group_size": 32}, "strategy 'tensor_group' with group_size 32 cannot be run .* tensor_group of 16 can"),
    ({"strategy": "group"}, "strategy 'group' with group_size 16 cannot be run"),
    ({"scale_dtype": "torch.bfloat16"}, "scale_dtype 'torch.bfloat16' cannot be run"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_groups_that_cannot_be_run_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = manifest("NVFP4A16")
    config["config_groups"]["group_0"]["weights"] |= changes
    with pytest.raises(ModelFileError, match=message):
        scheme_of({"quantization_config": config}, LAYER)


def with_nan(scale: torch.Tensor) -> torch.Tensor:
    raw = scale.view(torch.uint8).clone()
    raw[3, 1] = 0xFF
    return raw.view(scale.dtype)


DAMAGE: list[tuple[str, str, torch.Tensor | None, str]] = [
    ("NVFP4A16", "weight_packed", None, r"no tensor named .*up_proj\.weight_packed"),
    ("NVFP4A16", "weight_packed", torch.zeros(16, 23, dtype=torch.uint8), r"\[16, 23\], expected uint8 \[16, 24\]"),
    ("NVFP4A16", "weight_packed", torch.zeros(16, 24, dtype=torch.int8), "weight_packed is torch.int8"),
    ("NVFP4A16", "weight_scale", torch.zeros(16, 3), "weight_scale is torch.float32"),
    ("NVFP4A16", "weight_scale", torch.zeros(16, 2).to(torch.float8_e4m3fn), r"weight_scale has shape \[16, 2\]"),
    ("NVFP4A16", "weight_scale", with_nan(torch.zeros(16, 3).to(torch.float8_e4m3fn)), "weight_scale holds NaN"),
    ("NVFP4A16", "weight_global_scale", None, "no tensor named .*weight_global_scale"),
    ("NVFP4A16", "weight_global_scale", torch.zeros(1), "weight_global_scale is 0.0, expected a positive number"),
    ("NVFP4A16", "weight_global_scale", torch.tensor([float("nan")]), "weight_global_scale is nan"),
    ("NVFP4A16", "weight_global_scale", torch.ones(2), r"weight_global_scale has shape \[2\]"),
    ("MXFP4A16", "weight_scale", torch.zeros(16, 3).to(torch.float8_e4m3fn), "weight_scale is torch.float8_e4m3fn"),
    ("MXFP4A16", "weight_scale", with_nan(torch.zeros(16, 3, dtype=torch.uint8)), "weight_scale holds NaN"),
]


@pytest.mark.parametrize(("preset", "suffix", "tensor", "message"), DAMAGE)
def test_tensors_that_do_not_fit_are_refused(
    preset: str, suffix: str, tensor: torch.Tensor | None, message: str
) -> None:
    tensors = float4_weight_tensors(LAYER, every_code(preset))
    if tensor is None:
        del tensors[f"{LAYER}.{suffix}"]
    else:
        tensors[f"{LAYER}.{suffix}"] = tensor
    shape = (16, 3 * SCHEMES[preset].group_size)
    with pytest.raises(ModelFileError, match=message):
        load_quantized(InMemory(tensors, manifest(preset)), LAYER, shape)


def test_rows_that_groups_do_not_divide_are_refused() -> None:
    tensors = float4_weight_tensors(LAYER, every_code("MXFP4A16"))
    with pytest.raises(ModelFileError, match="weight_packed has rows of 80, which groups of 32 do not divide"):
        load_quantized(InMemory(tensors, manifest("MXFP4A16")), LAYER, (16, 80))


def test_a_divisor_may_have_no_dimension() -> None:
    tensors = float4_weight_tensors(LAYER, every_code("NVFP4A16"))
    tensors[f"{LAYER}.weight_global_scale"] = torch.tensor(1234.5)
    matrix = load_quantized(InMemory(tensors, manifest("NVFP4A16")), LAYER, (16, 48))
    assert matrix is not None
    assert torch.equal(matrix.weight.dequantize(), every_code("NVFP4A16").dequantize())


def test_half_dense_products_stay_apart(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    kept = ("lm_head", "layers.0.self_attn.q_proj")
    config = manifest("NVFP4A16") | {"ignore": ["lm_head", "model.layers.0.self_attn.q_proj"]}
    quantized, dense = write_pair(tiny_model_dir("llama"), tmp_path, config, quantize_layer("NVFP4A16"), kept)
    model = load_model(open_checkpoint(quantized), "cpu", torch.bfloat16)
    formats = model.blocks[0].attention.qkv.formats
    assert [fmt.name for fmt in formats] == ["bfloat16", "nvfp4 as bfloat16", "nvfp4 as bfloat16"]
    assert isinstance(formats[0], Dense)
    expected = load_model(open_checkpoint(dense), "cpu", torch.bfloat16).score(IDS)
    assert (model.score(IDS) - expected).abs().max() < 0.05 * expected.abs().max()
