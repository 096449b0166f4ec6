"""GPTQ checkpoints, written by numpy from the format's description, read back to the same numbers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.gptq import GPTQScheme, gptq_scheme_of, load_gptq_weight
from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.quantized import load_quantized, running_formats
from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.model.weights import IntWeight
from powertrain.types import ModelFileError
from quantized_builders import Codes, InMemory, Quantize, Tensors, gptq_tensors, named, random_codes, write_pair

IDS = torch.arange(80) * 13 % 300  # more rows than torch's products in bfloat16 take
LAYER = "model.layers.0.mlp.up_proj"


def config(**changes: Any) -> dict[str, Any]:
    sound = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "lm_head": False}
    return sound | {"checkpoint_format": "gptq", "true_sequential": True, "dynamic": None} | changes


def read(made: Codes, version: int, is_symmetric: bool = False, tensors: Tensors | None = None) -> IntWeight:
    groups = made.zeros.shape[1]
    size = None if groups == 1 else made.codes.shape[1] // groups
    scheme = GPTQScheme(made.bits, size, version == 1, is_symmetric, has_act_order=False)
    checkpoint = InMemory(named(LAYER, tensors or gptq_tensors(made, version)))
    return load_gptq_weight(checkpoint, LAYER, scheme, made.codes.shape)  # type: ignore[arg-type]


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 5),
    size=st.integers(1, 40),
    form=st.sampled_from([(2, 1), (2, 2), (3, 2), (4, 1), (4, 2), (8, 1), (8, 2)]),
    is_scattered=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_matrix_is_read_to_the_numbers_it_was_made_of(
    rows: int, groups: int, size: int, form: tuple[int, int], is_scattered: bool, seed: int
) -> None:
    bits, version = form
    made = random_codes(rows, groups * size, size, bits, seed, is_scattered=is_scattered)
    weight = read(made, version)
    assert torch.equal(weight.dequantize(), made.meaning())
    assert weight.values.dtype == torch.int8
    assert weight.num_bits == bits
    order = np.arange(groups * size) if weight.input_order is None else weight.input_order.numpy()
    assert (made.group_of[order] == np.arange(groups * size) // size).all()
    assert (weight.input_order is None) == (np.sort(made.group_of) == made.group_of).all()
    half = 2 ** (bits - 1)
    assert (weight.values.numpy() == made.codes[:, order] - half).all()
    assert (weight.zero_point is None) == (made.zeros == half).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_zeros_in_the_middle_are_no_zeros(bits: int, version: int) -> None:
    made = random_codes(12, 64, 16, bits)
    made = made._replace(zeros=np.full_like(made.zeros, 2 ** (bits - 1)))
    weight = read(made, version, is_symmetric=True)
    assert weight.zero_point is None
    assert torch.equal(weight.dequantize(), made.meaning())


def test_zeros_of_the_second_version_under_the_first_ones_name_are_told_by_sym() -> None:
    made = random_codes(12, 64, 16, 4)
    made = made._replace(zeros=np.full_like(made.zeros, 8))
    misnamed = gptq_tensors(made, version=2)
    assert torch.equal(read(made, 1, is_symmetric=True, tensors=misnamed).dequantize(), made.meaning())
    nine = made._replace(zeros=np.full_like(made.zeros, 9))
    assert torch.equal(read(made, 1, is_symmetric=False, tensors=misnamed).dequantize(), nine.meaning())


@pytest.mark.parametrize("rows", [32, 96])
def test_three_bits_with_zeros_that_older_writers_misplaced_are_symmetric_too(rows: int) -> None:
    made = random_codes(rows, 64, 16, 3)
    made = made._replace(zeros=np.full_like(made.zeros, 4))
    tensors = gptq_tensors(made, version=2)
    words = tensors["qzeros"].numpy().view(np.uint32).copy()
    words[:, 0::3] -= np.uint32(0b00100100100100100100100100100100)
    words[:, 1::3] -= np.uint32(0b10010010010010010010010010010010)
    words[:, 2::3] -= np.uint32(0b01001001001001001001001001001001)
    tensors["qzeros"] = torch.from_numpy(words.view(np.int32))
    assert torch.equal(read(made, 1, is_symmetric=True, tensors=tensors).dequantize(), made.meaning())
    tensors["qzeros"] = tensors["qzeros"] + 1
    with pytest.raises(ModelFileError, match="qzeros are not all in the middle, as sym says"):
        read(made, 1, is_symmetric=True, tensors=tensors)


def test_without_g_idx_groups_stand_in_order() -> None:
    made = random_codes(8, 64, 16, 4)
    tensors = gptq_tensors(made)
    del tensors["g_idx"]
    assert torch.equal(read(made, 1, tensors=tensors).dequantize(), made.meaning())


def quantizer(
    bits: int, group_size: int | None, version: int, order_of: Callable[[str], str] | None = None
) -> Quantize:
    """Random integers for each layer; `order_of`: layers that it maps to one word share an activation order."""

    def quantize(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = weight.shape
        made = random_codes(rows, columns, group_size, bits, zlib.crc32(layer.encode()))
        if order_of is not None:
            rng = np.random.default_rng(zlib.crc32(order_of(layer).encode()))
            made = made._replace(group_of=rng.permutation(made.group_of))
        return gptq_tensors(made, version), made.meaning()

    return quantize


FOLDERS: dict[str, tuple[str, Quantize, dict[str, Any], str]] = {
    "4 bits": ("llama", quantizer(4, 32, 1), {}, "int4"),
    "4 bits, second version": ("qwen2", quantizer(4, 32, 2), {"checkpoint_format": "gptq_v2"}, "int4"),
    "act order": (
        "llama",
        quantizer(4, 32, 1, lambda layer: layer.rsplit(".", 1)[0]),
        {"desc_act": True},
        "int4 act-order",
    ),
    "2 bits": ("llama", quantizer(2, 32, 1), {"bits": 2}, "int4"),
    "3 bits": ("qwen3", quantizer(3, 32, 2), {"bits": 3, "checkpoint_format": "gptq_v2"}, "int4"),
    "8 bits by channel": ("qwen3", quantizer(8, None, 1), {"bits": 8, "group_size": -1}, "int8"),
    "8 bits, act order": (
        "llama",
        quantizer(8, 32, 1, lambda layer: layer),
        {"bits": 8, "desc_act": True},
        "int8 group act-order",
    ),
}


@pytest.mark.parametrize(("family", "quantize", "changes", "name"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_gives_the_logits_of_the_weights_it_means(
    tiny_model_dir: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    quantize: Quantize,
    changes: dict[str, Any],
    name: str,
) -> None:
    quantized, dense = write_pair(tiny_model_dir(family), tmp_path, config(**changes), quantize)
    model = load_model(open_checkpoint(quantized), "cpu", torch.float32)
    expected = load_model(open_checkpoint(dense), "cpu", torch.float32).score(IDS)
    assert (model.score(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert sorted(model.formats()) == sorted([name, "float32"])
    shares_order = not changes.get("desc_act") or changes.get("bits") != 8
    assert len(model.blocks[0].attention.qkv.formats) == (1 if shares_order else 3)


def test_a_quantized_head_is_read_where_lm_head_says_so(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    quantized, dense = write_pair(
        tiny_model_dir("llama3"), tmp_path, config(lm_head=True), quantizer(4, 32, 1), kept=()
    )
    model = load_model(open_checkpoint(quantized), "cpu", torch.float32)
    expected = load_model(open_checkpoint(dense), "cpu", torch.float32).score(IDS)
    assert (model.score(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert [fmt.name for fmt in model.head.formats] == ["int4"]


def test_formats_unpack_to_what_they_multiply() -> None:
    made = random_codes(24, 64, 32, 4, is_scattered=True)
    checkpoint: Checkpoint = InMemory(named(LAYER, gptq_tensors(made)), config(desc_act=True))
    matrix = load_quantized(checkpoint, LAYER, (24, 64))
    assert matrix is not None
    (fmt,) = running_formats([matrix, matrix], torch.device("cpu"))
    whole = made.meaning().repeat(2, 1)
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fmt.unpack(), whole)
    assert torch.allclose(fmt.matmul(x), x @ whole.t(), atol=1e-5)
    assert fmt.out_features == 48
    assert fmt.step_bytes() == 48 * 32 + 48 * 2 * 4 + 64 * 8  # nibbles, scales and minima, order
    assert fmt.nbytes() >= fmt.step_bytes()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bits": 5}, "bits 5 cannot be run; 2, 3, 4 and 8 can"),
    ({"bits": 3}, "sym false with bits 3 cannot be run: writers disagree about its zeros"),
    ({"bits": None}, "bits None"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    ({"is_marlin_format": True}, "checkpoint_format 'marlin'"),
    ({"pack_dtype": "int64"}, "pack_dtype 'int64'"),
    ({"group_size": 0}, "group_size 0"),
    ({"group_size": "128"}, "group_size '128'"),
    ({"group_size": 2**40}, f"group_size {2**40} does not divide the 64 inputs of {LAYER}"),
    ({"sym": "yes"}, "sym is 'yes'"),
    ({"dynamic": {"-:.*down.*": {}}}, "dynamic: layers"),
    ({"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, "modules_in_block_to_quantize: layers"),
    ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' cannot be run; awq, compressed-tensors, fp8, gptq"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_configs_that_cannot_be_run_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    checkpoint: Checkpoint = InMemory(named(LAYER, gptq_tensors(random_codes(24, 64, 32, 4))), config(**changes))
    with pytest.raises(ModelFileError, match=message):
        load_quantized(checkpoint, LAYER, (24, 64))


def test_a_config_that_is_no_mapping_is_refused() -> None:
    checkpoint: Checkpoint = InMemory({})
    checkpoint.config["quantization_config"] = ["gptq"]
    with pytest.raises(ModelFileError, match="quantization_config: is a list"):
        load_quantized(checkpoint, LAYER, (24, 64))


def test_trivial_overrides_and_a_float_head_are_no_obstacle() -> None:
    sound = config(dynamic={}, modules_in_block_to_quantize=None)
    assert gptq_scheme_of(sound, LAYER) == GPTQScheme(4, 32, True, False, False)
    assert gptq_scheme_of(sound, "lm_head") is None
    assert gptq_scheme_of(config(lm_head=True), "lm_head") is not None


INTS = torch.int32
DAMAGE: list[tuple[str, torch.Tensor | None, str]] = [
    ("qweight", None, r"no tensor named .*up_proj\.qweight"),
    ("qweight", torch.zeros(7, 24, dtype=INTS), r"qweight has shape \[7, 24\], expected int32 \[8, 24\]"),
    ("qweight", torch.zeros(8, 24, dtype=torch.int64), r"qweight is torch.int64 \[8, 24\], expected int32"),
    ("qzeros", None, "qzeros"),
    ("qzeros", torch.zeros(2, 2, dtype=INTS), "qzeros has shape"),
    ("scales", torch.zeros(2, 23), "scales has shape"),
    ("scales", torch.zeros(2, 24, dtype=INTS), "scales is torch.int32"),
    ("scales", torch.zeros(2, 24).to(torch.float8_e4m3fn), "scales is torch.float8_e4m3fn"),
    ("g_idx", None, "g_idx"),
    ("g_idx", torch.zeros(63, dtype=INTS), "g_idx has shape"),
    ("g_idx", torch.zeros(64), "g_idx is torch.float32"),
    ("g_idx", torch.arange(64, dtype=INTS), "g_idx names groups beyond the 2"),
    ("g_idx", torch.arange(64, dtype=INTS) // 32 - 1, "g_idx names groups beyond the 2"),
    ("g_idx", (torch.arange(64) > 20).to(INTS), "g_idx has groups of 21 to 43 inputs, expected 32"),
]


@pytest.mark.parametrize(("suffix", "tensor", "message"), DAMAGE)
def test_tensors_that_do_not_fit_are_refused(suffix: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = gptq_tensors(random_codes(24, 64, 32, 4))
    if tensor is None:
        del tensors[suffix]
    else:
        tensors[suffix] = tensor
    checkpoint: Checkpoint = InMemory(named(LAYER, tensors), config(desc_act=True))
    with pytest.raises(ModelFileError, match=message):
        load_quantized(checkpoint, LAYER, (24, 64))
