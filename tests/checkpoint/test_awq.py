"""AWQ checkpoints, written by numpy from the format's description and judged by the compressed-tensors library."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.awq import AWQScheme, awq_scheme_of, load_awq_weight
from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.quantized import load_quantized
from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.types import ModelFileError
from quantized_builders import InMemory, Tensors, awq_tensors, named, random_codes, write_pair

IDS = torch.arange(80) * 13 % 300  # more rows than torch's products in bfloat16 take
LAYER = "model.layers.0.mlp.up_proj"


def config(**changes: Any) -> dict[str, Any]:
    sound = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    return sound | {"modules_to_not_convert": None} | changes


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 40), groups=st.integers(1, 5), size=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_any_matrix_is_read_to_the_numbers_it_was_made_of(rows: int, groups: int, size: int, seed: int) -> None:
    made = random_codes(rows, groups * size, size, 4, seed)
    checkpoint: Checkpoint = InMemory(named(LAYER, awq_tensors(made)))
    weight = load_awq_weight(checkpoint, LAYER, AWQScheme(size, True), (rows, groups * size))
    assert torch.equal(weight.dequantize(), made.meaning())
    assert (weight.values.numpy() == made.codes - 8).all()
    assert (weight.zero_point is None) == (made.zeros == 8).all()
    assert weight.input_order is None


@pytest.mark.parametrize(("rows", "columns", "size"), [(64, 96, 32), (8, 128, 128), (24, 64, 16)])
def test_the_library_reads_the_same_weights(rows: int, columns: int, size: int) -> None:
    made = random_codes(rows, columns, size, 4, seed=rows)
    checkpoint: Checkpoint = InMemory(named(LAYER, awq_tensors(made)), config(group_size=size))
    converter = AutoAWQConverter.from_autoawq_config(config(group_size=size))
    converted = converter.process(dict(named(LAYER, awq_tensors(made))))
    state = {name.removeprefix(f"{LAYER}."): tensor for name, tensor in converted.items()}
    (scheme,) = converter.update_config(None).config_groups.values()
    theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    matrix = load_quantized(checkpoint, LAYER, (rows, columns))
    assert matrix is not None
    # the library computes in the scales' float16, where these products are exact
    assert torch.equal(matrix.weight.dequantize(), theirs.float())


def test_zeros_in_the_middle_are_no_zeros_and_symmetric_files_have_none() -> None:
    made = random_codes(16, 64, 32, 4)
    made = made._replace(zeros=np.full_like(made.zeros, 8))
    tensors = named(LAYER, awq_tensors(made))
    weight = load_awq_weight(InMemory(tensors), LAYER, AWQScheme(32, True), (16, 64))
    assert weight.zero_point is None
    assert torch.equal(weight.dequantize(), made.meaning())
    del tensors[f"{LAYER}.qzeros"]
    symmetric = load_awq_weight(InMemory(tensors), LAYER, AWQScheme(32, False), (16, 64))
    assert torch.equal(symmetric.dequantize(), made.meaning())


def quantize(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    made = random_codes(*weight.shape, 32, 4, zlib.crc32(layer.encode()))
    return awq_tensors(made), made.meaning()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kept", ["mlp.down_proj", "v_proj"])
def test_a_folder_gives_the_logits_of_the_weights_it_means(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, family: str, kept: str
) -> None:
    manifest = config(modules_to_not_convert=[kept])
    quantized, dense = write_pair(tiny_model_dir(family), tmp_path, manifest, quantize, ("lm_head", kept))
    model = load_model(open_checkpoint(quantized), "cpu", torch.float32)
    expected = load_model(open_checkpoint(dense), "cpu", torch.float32).score(IDS)
    assert (model.score(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()
    names = [fmt.name for fmt in model.blocks[0].attention.qkv.formats]
    assert names == (["int4"] if kept == "mlp.down_proj" else ["int4", "int4", "float32"])


@pytest.mark.parametrize("name", [LAYER, "lm_head", "model.layers.1.self_attn.q_proj"])
def test_the_library_leaves_out_the_same_layers(name: str) -> None:
    for kept in (None, ["mlp"], ["layers.0"], ["lm_head"], ["model.layers.1.self_attn.q_proj"]):
        manifest = config(modules_to_not_convert=kept)
        theirs = AutoAWQConverter.from_autoawq_config(manifest)._is_targeted(name)
        assert (awq_scheme_of(manifest, name) is not None) == theirs


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"version": "gemv"}, "version 'gemv' of AWQ cannot be run; gemm can"),
    ({"version": None, "checkpoint_format": "marlin"}, "version 'marlin'"),
    ({"version": 2}, "version 2"),
    ({"backend": "llm-awq"}, "backend 'llm-awq'"),
    ({"bits": 8}, "bits 8 cannot be run"),
    ({"group_size": -2}, "group_size -2"),
    ({"group_size": 48}, f"group_size 48 does not divide the 64 inputs of {LAYER}"),
    ({"zero_point": 1}, "zero_point is 1"),
    ({"zero_point": False}, r"up_proj\.qzeros is there although zero_point is false"),
    ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is not a list"),
    ({"modules_to_not_convert": [""]}, "modules_to_not_convert is not a list"),
    ({"dynamic": {"+:.*": {"bits": 8}}}, "dynamic: layers"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_configs_that_cannot_be_run_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    checkpoint: Checkpoint = InMemory(named(LAYER, awq_tensors(random_codes(24, 64, 32, 4))), config(**changes))
    with pytest.raises(ModelFileError, match=message):
        load_quantized(checkpoint, LAYER, (24, 64))


DAMAGE: list[tuple[str, torch.Tensor | None, str]] = [
    ("qweight", None, r"no tensor named .*up_proj\.qweight"),
    ("qweight", torch.zeros(64, 2, dtype=torch.int32), r"qweight has shape \[64, 2\], expected int32 \[64, 3\]"),
    ("qweight", torch.zeros(64, 3), "qweight is torch.float32"),
    ("qzeros", None, "qzeros"),
    ("qzeros", torch.zeros(1, 3, dtype=torch.int32), "qzeros has shape"),
    ("scales", torch.zeros(24, 2), "scales has shape"),
]


@pytest.mark.parametrize(("suffix", "tensor", "message"), DAMAGE)
def test_tensors_that_do_not_fit_are_refused(suffix: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = awq_tensors(random_codes(24, 64, 32, 4))
    if tensor is None:
        del tensors[suffix]
    else:
        tensors[suffix] = tensor
    checkpoint: Checkpoint = InMemory(named(LAYER, tensors), config())
    with pytest.raises(ModelFileError, match=message):
        load_quantized(checkpoint, LAYER, (24, 64))
