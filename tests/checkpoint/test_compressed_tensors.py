"""Our packed integers and manifest, judged by the compressed-tensors library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.compressed_tensors import (
    int_weight_tensors,
    load_int_weight,
    num_words,
    pack_int32,
    quantization_config,
    scheme_of,
    unpack_int32,
)
from powertrain.checkpoint.safetensors_folder import SafetensorsCheckpoint, write_checkpoint
from powertrain.model.weights import IntWeight
from powertrain.types import ModelFileError, PowertrainError, QuantScheme

W4G = QuantScheme(num_bits=4, group_size=32)
W4G_ASYM = QuantScheme(num_bits=4, group_size=32, symmetric=False)
W8C = QuantScheme(num_bits=8)
W8C_ASYM = QuantScheme(num_bits=8, symmetric=False)
OTHER_WIDTHS = [
    QuantScheme(num_bits=bits, group_size=size, symmetric=symmetric)
    for bits in (2, 3, 5, 6, 7)
    for size, symmetric in ((32, True), (32, False), (None, False))
]
SCHEMES = [W4G, W4G_ASYM, W8C, W8C_ASYM, *OTHER_WIDTHS]


def random_int_weight(scheme: QuantScheme, out_features: int, in_features: int) -> IntWeight:
    generator = torch.Generator().manual_seed(out_features * in_features)
    groups = in_features // (scheme.group_size or in_features)
    low, high = -(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1)
    return IntWeight(
        values=torch.randint(low, high, (out_features, in_features), generator=generator, dtype=torch.int8),
        scale=torch.rand(out_features, groups, generator=generator) + 0.01,
        zero_point=None
        if scheme.symmetric
        else torch.randint(low, high, (out_features, groups), generator=generator, dtype=torch.int8),
        num_bits=scheme.num_bits,
    )


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 140), num_bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_packing_is_the_librarys_bit_for_bit(rows: int, columns: int, num_bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    high = 2 ** (num_bits - 1)
    values = torch.randint(-high, high, (rows, columns), generator=generator, dtype=torch.int8)
    packed = pack_int32(values, num_bits)
    assert torch.equal(packed, pack_to_int32(values, num_bits))
    assert torch.equal(unpack_from_int32(packed, num_bits, torch.Size(values.shape)), values)
    assert torch.equal(unpack_int32(packed, num_bits, values.shape), values)
    assert packed.shape == (rows, num_words(columns, num_bits))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 140), num_bits=st.integers(2, 8), seed=st.integers(0, 99))
def test_any_words_are_unpacked_as_the_library_does(rows: int, columns: int, num_bits: int, seed: int) -> None:
    shape = (num_words(columns, num_bits), rows)
    words = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    packed = words.to(torch.int32).t()  # zero points come transposed
    # the library views words as bytes, which a transposed column of one word does not allow
    plain = packed.clone(memory_format=torch.contiguous_format)
    theirs = unpack_from_int32(plain, num_bits, torch.Size((rows, columns)))
    assert torch.equal(unpack_int32(packed, num_bits, (rows, columns)), theirs)


@pytest.mark.parametrize("num_bits", range(2, 8))
def test_values_that_do_not_fit_are_refused(num_bits: int) -> None:
    for value in (2 ** (num_bits - 1), -(2 ** (num_bits - 1)) - 1):
        with pytest.raises(ValueError, match=f"{num_bits} bits"):
            pack_int32(torch.tensor([[value]], dtype=torch.int8), num_bits)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(64, 96), (7, 32), (13, 64)])
def test_the_library_decodes_our_files_to_the_same_weights(
    tmp_path: Path, scheme: QuantScheme, shape: tuple[int, int]
) -> None:
    weight = random_int_weight(scheme, *shape)
    layer = "model.layers.0.mlp.up_proj"
    config = {"quantization_config": quantization_config([(scheme, ["Linear"])], ["lm_head"])}
    out = write_checkpoint(tmp_path / "m", config, int_weight_tensors(layer, weight).items())
    checkpoint = SafetensorsCheckpoint(out)
    theirs = QuantizationConfig.model_validate(checkpoint.config["quantization_config"]).config_groups["group_0"]
    state = {name.removeprefix(f"{layer}."): checkpoint.load(name) for name in checkpoint.names()}
    decoded = PackedQuantizationCompressor.decompress(state, theirs)
    assert torch.equal(decoded["weight"], weight.dequantize())

    assert scheme_of(checkpoint.config, layer) == scheme
    ours = load_int_weight(checkpoint, layer, scheme)
    assert torch.equal(ours.values, weight.values)
    assert torch.equal(ours.scale, weight.scale)
    assert ours.num_bits == weight.num_bits
    if weight.zero_point is None:
        assert ours.zero_point is None
    else:
        assert ours.zero_point is not None
        assert torch.equal(ours.zero_point, weight.zero_point)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_we_decode_what_the_library_wrote(tmp_path: Path, scheme: QuantScheme) -> None:
    theirs = QuantizationConfig.model_validate(quantization_config([(scheme, ["Linear"])], [])).config_groups["group_0"]
    weight = random_int_weight(scheme, 24, 64)
    state = {"weight": weight.dequantize(), "weight_scale": weight.scale}
    state["weight_zero_point"] = torch.zeros(weight.scale.shape, dtype=torch.int8)
    if weight.zero_point is not None:
        state["weight_zero_point"] = weight.zero_point
    packed = PackedQuantizationCompressor.compress(state, theirs)
    out = write_checkpoint(tmp_path / "m", {}, [(f"a.{name}", tensor) for name, tensor in packed.items()])
    assert torch.equal(load_int_weight(SafetensorsCheckpoint(out), "a", scheme).values, weight.values)


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in ("q_proj", "up_proj", "down_proj")})
            for _ in range(3)
        )
        self.lm_head = torch.nn.Linear(64, 64)


TARGETS: list[tuple[list[tuple[QuantScheme, list[str]]], list[str]]] = [
    ([(W4G, ["Linear"])], ["lm_head"]),
    ([(W4G, ["Linear"])], []),
    ([(W4G, ["Linear"])], ["re:.*lm_head", "re:layers\\.1\\..*"]),
    ([(W4G, ["re:.*up_proj$"]), (W8C, ["re:.*q_proj$"])], ["lm_head"]),
    ([(W4G, ["Linear"]), (W8C, ["re:.*down_proj"])], ["lm_head"]),
    ([(W4G, ["Linear"]), (W8C, ["re:.*down_proj"]), (W8C_ASYM, ["layers.1.down_proj"])], ["lm_head"]),
    ([(W8C_ASYM, ["layers.1.down_proj"]), (W8C, ["re:.*down_proj"]), (W4G, ["Linear"])], ["lm_head"]),
    ([(W4G, ["re:up_proj"])], []),
    ([(W4G, ["layers.0.q_proj", "layers.2.q_proj"])], ["layers.2.q_proj"]),
]


@pytest.mark.parametrize(("groups", "ignore"), TARGETS)
def test_the_library_applies_our_manifest_to_the_same_layers(
    groups: list[tuple[QuantScheme, list[str]]], ignore: list[str]
) -> None:
    ours = {"quantization_config": quantization_config(groups, ignore)}
    model = Tiny()
    apply_quantization_config(model, QuantizationConfig.model_validate(ours["quantization_config"]))
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        theirs = getattr(module, "quantization_scheme", None)
        scheme = scheme_of(ours, name)
        assert (theirs is None) == (scheme is None), name
        if theirs is not None and scheme is not None:
            weights = theirs.weights
            assert (weights.num_bits, weights.group_size, weights.symmetric, weights.strategy) == (
                scheme.num_bits,
                scheme.group_size,
                scheme.symmetric,
                scheme.strategy,
            ), name


def test_a_plain_model_has_no_scheme() -> None:
    assert scheme_of({"model_type": "llama"}, "lm_head") is None


def changed(path: str, value: Any) -> dict[str, Any]:
    """A sound manifest with one entry changed."""
    manifest: dict[str, Any] = quantization_config([(W4G, ["Linear"])], ["lm_head"])
    *parents, key = path.split("/")
    part = manifest
    for parent in parents:
        part = part[parent]
    part[key] = value
    return {"quantization_config": manifest}


REFUSED: list[tuple[str, Any, str]] = [
    ("quant_method", "gptq", "'gptq'"),
    ("quant_method", None, "None"),
    ("quantization_status", "frozen", "'frozen'"),
    ("kv_cache_scheme", {"num_bits": 4}, "kv_cache_scheme"),
    ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config"),
    ("config_groups", [], "config_groups"),
    ("config_groups/group_0", {"targets": "Linear", "weights": {}}, "config_groups"),
    ("config_groups/group_0/format", "float-quantized", "'float-quantized'"),
    ("config_groups/group_0/format", "nvfp4-pack-quantized", "nvfp4"),
    ("config_groups/group_0/input_activations", {"num_bits": 8}, "input_activations"),
    ("config_groups/group_0/weights/type", "float", "float weights"),
    ("config_groups/group_0/weights/num_bits", 1, "1 bits cannot be run; int of 2 to 8 bits can"),
    ("config_groups/group_0/weights/num_bits", 9, "9 bits"),
    ("config_groups/group_0/weights/num_bits", 4.0, r"4\.0 bits"),
    ("config_groups/group_0/weights/num_bits", True, "True bits"),
    ("config_groups/group_0/weights/strategy", "block", "'block'"),
    ("config_groups/group_0/weights/group_size", None, "group_size None"),
    ("config_groups/group_0/weights/group_size", 0, "group_size 0"),
    ("config_groups/group_0/weights/actorder", "group", "activation order"),
    ("config_groups/group_0/targets", ["re:("], "not a regular expression"),
    ("ignore", "lm_head", "ignore"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED)
def test_what_cannot_be_run_is_refused_by_name(path: str, value: Any, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        scheme_of(changed(path, value), "model.layers.0.mlp.up_proj")


DAMAGE: list[tuple[str, torch.Tensor, str]] = [
    ("weight_shape", torch.tensor([64]), "weight_shape"),
    ("weight_shape", torch.tensor([-1, 96]), "weight_shape"),
    ("weight_shape", torch.tensor([2**40, 96]), "weight_shape"),
    ("weight_shape", torch.tensor([64.0, 96.0]), "weight_shape"),
    ("weight_shape", torch.tensor([64, 80]), "do not divide"),
    ("weight_shape", torch.tensor([65, 96]), "weight_packed"),
    ("weight_packed", torch.zeros(64, 12, dtype=torch.int64), "weight_packed"),
    ("weight_packed", torch.zeros(64, 11, dtype=torch.int32), "weight_packed"),
    ("weight_scale", torch.zeros(64, 2), "weight_scale"),
    ("weight_scale", torch.zeros(64, 3, dtype=torch.int32), "weight_scale"),
    ("weight_zero_point", torch.zeros(64, 3, dtype=torch.int32), "weight_zero_point"),
    ("weight_g_idx", torch.zeros(96, dtype=torch.int32), "weight_g_idx"),
]


@pytest.mark.parametrize(("suffix", "tensor", "message"), DAMAGE)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, suffix: str, tensor: torch.Tensor, message: str) -> None:
    tensors = int_weight_tensors("a", random_int_weight(W4G_ASYM, 64, 96)) | {f"a.{suffix}": tensor}
    checkpoint = SafetensorsCheckpoint(write_checkpoint(tmp_path / "m", {}, tensors.items()))
    with pytest.raises(ModelFileError, match=message):
        load_int_weight(checkpoint, "a", W4G_ASYM)


@pytest.mark.parametrize(("num_bits", "per_word"), [(3, 10), (5, 6), (6, 5), (7, 4)])
def test_words_padded_to_whole_values_are_refused_by_name(tmp_path: Path, num_bits: int, per_word: int) -> None:
    scheme = QuantScheme(num_bits=num_bits, group_size=32)
    tensors = int_weight_tensors("a", random_int_weight(scheme, 8, 96))
    tensors["a.weight_packed"] = torch.zeros(8, -(-96 // per_word), dtype=torch.int32)
    checkpoint = SafetensorsCheckpoint(write_checkpoint(tmp_path / "m", {}, tensors.items()))
    message = f"weight_packed holds {per_word} values of {num_bits} bits a word; dense words can be run"
    with pytest.raises(ModelFileError, match=message):
        load_int_weight(checkpoint, "a", scheme)


def test_rounded_activations_beside_other_widths_are_refused() -> None:
    manifest: dict[str, Any] = quantization_config([(QuantScheme(num_bits=8, activation_bits=8), ["Linear"])], [])
    manifest["config_groups"]["group_0"]["weights"]["num_bits"] = 6
    with pytest.raises(ModelFileError, match="input_activations beside weights of 6 bits cannot be run"):
        scheme_of({"quantization_config": manifest}, "model.layers.0.mlp.up_proj")
    for num_bits in (2, 3, 5, 6, 7):
        with pytest.raises(PowertrainError, match="num_bits must be 4 or 8 where activation_bits is 8"):
            QuantScheme(num_bits=num_bits, activation_bits=8)
    for num_bits in (1, 9, 4.0, True):
        with pytest.raises(PowertrainError, match="num_bits must be 2 to 8"):
            QuantScheme(num_bits=num_bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_bits", [3, 6])
def test_plain_integers_beyond_their_bits_are_refused(tmp_path: Path, num_bits: int) -> None:
    scheme = QuantScheme(num_bits=num_bits, group_size=32)
    weight = random_int_weight(scheme, 8, 32)
    out = write_checkpoint(tmp_path / "m", {}, int_weight_tensors("a", weight, "int-quantized").items())
    assert torch.equal(load_int_weight(SafetensorsCheckpoint(out), "a", scheme).values, weight.values)
    narrower = QuantScheme(num_bits=num_bits - 1, group_size=32)
    with pytest.raises(ModelFileError, match=f"a.weight holds integers beyond {num_bits - 1} bits"):
        load_int_weight(SafetensorsCheckpoint(out), "a", narrower)


def test_a_missing_zero_point_is_refused(tmp_path: Path) -> None:
    tensors = int_weight_tensors("a", random_int_weight(W4G, 64, 96))
    checkpoint = SafetensorsCheckpoint(write_checkpoint(tmp_path / "m", {}, tensors.items()))
    with pytest.raises(ModelFileError, match=r"a\.weight_zero_point"):
        load_int_weight(checkpoint, "a", W4G_ASYM)
