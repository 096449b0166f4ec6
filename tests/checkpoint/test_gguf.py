"""GGUF: values judged by the `gguf` package and transformers, files damaged in every way we could think of."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gguf_builder import ROPE_FACTORS, build_gguf, gguf_name, interleave_halves
from powertrain.checkpoint.gguf import BLOCK_TYPES, GGUFCheckpoint
from powertrain.checkpoint.gguf_blocks import dequantize
from powertrain.checkpoint.source import iterate, open_checkpoint
from powertrain.types import ModelFileError

Quant = gguf.GGMLQuantizationType
quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("type_id", BLOCK_TYPES)
def test_every_type_decodes_as_the_gguf_package_does(type_id: int) -> None:
    block = BLOCK_TYPES[type_id]
    assert Quant(type_id).name == block.name
    assert gguf.constants.GGML_QUANT_SIZES[Quant(type_id)] == (block.num_weights, block.num_bytes)
    rng = np.random.default_rng(type_id)
    rows = rng.integers(0, 256, (300, 5 * block.num_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(rows, Quant(type_id))
    ours = dequantize(block.name, rows).numpy()
    assert ours.shape == expected.shape == (300, 5 * block.num_weights)
    assert np.array_equal(ours, expected, equal_nan=True)
    assert np.isfinite(expected).mean() > 0.5


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_float32_files_give_the_original_weights(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    folder = tiny_model_dir(family)
    checkpoint = open_checkpoint(build_gguf(folder, tmp_path / "m.gguf", Quant.F32))
    original = load_file(folder / "model.safetensors")
    assert checkpoint.names() == sorted(original)
    for name, tensor in iterate(checkpoint):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, original[name]), name
        assert checkpoint.nbytes(name) == tensor.nbytes
    config = json.loads((folder / "config.json").read_text())
    same = (
        "model_type architectures hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads vocab_size max_position_embeddings rms_norm_eps bos_token_id eos_token_id hidden_act "
        "tie_word_embeddings"
    )
    for key in same.split():
        assert checkpoint.config[key] == config[key], key
    assert checkpoint.config["head_dim"] == (32 if family == "qwen3" else 16)
    assert checkpoint.config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert checkpoint.config["sliding_window"] == (24 if family == "mistral" else None)
    assert checkpoint.config["attention_bias"] == (family == "qwen2")
    assert checkpoint.generation_config == {"eos_token_id": [1]}


# not qwen3: transformers ignores the head size that its GGUF metadata states
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_the_same_weights_from_the_same_file(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    path = build_gguf(tiny_model_dir(family), tmp_path / "m.gguf", Quant.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    for name, tensor in iterate(open_checkpoint(path)):
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("quant", [Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q4_0, Quant.Q4_1, Quant.Q5_0, Quant.Q5_1])
def test_quantized_files_decode_in_hugging_face_row_order(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, quant: Quant
) -> None:
    checkpoint = GGUFCheckpoint(build_gguf(tiny_model_dir("llama"), tmp_path / "m.gguf", quant))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    theirs = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for name in checkpoint.names():
        ours = checkpoint.load(name).numpy()
        is_permuted = "q_proj" in name or "k_proj" in name
        assert np.array_equal(interleave_halves(ours, 16) if is_permuted else ours, theirs[gguf_name(name)]), name
    type_name, rows, shape = checkpoint.raw("model.layers.1.self_attn.k_proj.weight")
    assert type_name == quant.name
    assert shape == checkpoint.shape("model.layers.1.self_attn.k_proj.weight") == (32, 64)
    assert rows.dtype == np.uint8
    assert torch.equal(dequantize(type_name, rows), checkpoint.load("model.layers.1.self_attn.k_proj.weight"))


def test_rope_factors_are_part_of_the_config(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = build_gguf(tiny_model_dir("llama3"), tmp_path / "m.gguf", Quant.F32, rope_factors=True)
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.config["rope_factors"] == ROPE_FACTORS
    assert not any("rope" in name for name in checkpoint.names())


def test_metadata_is_what_the_gguf_package_reads(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = build_gguf(tiny_model_dir("llama"), tmp_path / "m.gguf", Quant.F32)
    fields = gguf.GGUFReader(path).fields
    theirs = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert GGUFCheckpoint(path).metadata == theirs


def test_a_folder_with_one_gguf_opens(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    build_gguf(tiny_model_dir("qwen2"), tmp_path / "m.gguf", Quant.Q4_0)
    assert open_checkpoint(tmp_path).config["model_type"] == "qwen2"
    with pytest.raises(ModelFileError, match="no tensor named nonsense"):
        open_checkpoint(tmp_path).load("nonsense")


def test_metadata_needs_no_torch(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    path = build_gguf(tiny_model_dir("qwen2"), tmp_path / "m.gguf", Quant.Q4_0)
    code = (
        "import sys; from powertrain.checkpoint.source import open_checkpoint; c = open_checkpoint(sys.argv[1]); "
        "assert c.raw(c.names()[0]); assert 'torch' not in sys.modules; print(len(c.metadata))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_default_model(smollm2_gguf: Path) -> None:
    checkpoint = GGUFCheckpoint(smollm2_gguf)
    config = checkpoint.config
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-5, 100000.0, 64)
    assert config["tie_word_embeddings"]
    assert len(checkpoint.metadata["tokenizer.ggml.merges"]) == 48900
    assert checkpoint.raw("model.embed_tokens.weight")[0] == "Q8_0"
    assert checkpoint.load("model.layers.29.mlp.down_proj.weight").isfinite().all()


@pytest.mark.big
def test_default_model_speaks_in_transformers(smollm2_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text  # with q/k rows in the wrong order it would be noise


# ---- damaged and hostile files ----


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def tensor(name: str, shape: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", type_id, offset)


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")
SIZES = [
    number("llama.embedding_length", 8),
    number("llama.block_count", 1),
    number("llama.feed_forward_length", 8),
    number("llama.context_length", 8),
    number("llama.attention.head_count", 2),
]
KEYS = [ARCHITECTURE, *SIZES]
EMBEDDING = tensor("token_embd.weight", [8, 4])


def gguf_bytes(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    version: int = 3,
    data: bytes = bytes(128),
) -> bytes:
    keys = KEYS if keys is None else keys
    tensors = [EMBEDDING] if tensors is None else tensors
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys + tensors)
    return head + bytes(-len(head) % 32) + data


def array(key: str, item_type: int, length: int, items: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, item_type, length) + items


def nested(depth: int) -> bytes:
    return text("n") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


def with_rope_factors(count: int) -> bytes:
    return gguf_bytes(tensors=[EMBEDDING, tensor("rope_freqs.weight", [count], offset=128)], data=bytes(256))


def float_key(key: str, value: float) -> bytes:
    return text(key) + struct.pack("<If", 6, value)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "magic only": (b"GGUF", "not a GGUF file"),
    "other magic": (b"GGML" + bytes(100), "not a GGUF file"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "version 99": (gguf_bytes(version=99), "version 99"),
    "big endian": (gguf_bytes(version=0x03000000), "big-endian"),
    "huge key count": (gguf_bytes(num_keys=2**60), "metadata keys"),
    "more keys than bytes": (gguf_bytes(num_keys=50_000), "metadata keys"),
    "huge tensor count": (gguf_bytes(num_tensors=2**63), "tensors"),
    "key longer than file": (gguf_bytes([struct.pack("<Q", 2**62) + b"x"]), "past the end"),
    "key length of all ones": (gguf_bytes([struct.pack("<Q", 2**64 - 1) + b"x"]), "past the end"),
    "key is not utf-8": (gguf_bytes([text(b"\xff\xfe") + struct.pack("<II", 4, 1)]), "not UTF-8"),
    "key twice": (gguf_bytes([*KEYS, SIZES[0]]), "stands twice"),
    "unknown value type": (gguf_bytes([*KEYS, text("x") + struct.pack("<II", 77, 1)]), "unknown value type 77"),
    "unknown item type": (gguf_bytes([*KEYS, array("x", 77, 1, bytes(16))]), "unknown value type 77"),
    "huge number array": (gguf_bytes([*KEYS, array("x", 10, 2**61)]), "array items"),
    "huge string array": (gguf_bytes([*KEYS, array("x", 8, 2**61)]), "array items"),
    "huge array of arrays": (gguf_bytes([*KEYS, array("x", 9, 2**61)]), "array items"),
    "deeply nested arrays": (gguf_bytes([*KEYS, nested(5000)]), "nested too deep"),
    "string array past the end": (gguf_bytes([*KEYS, array("x", 8, 2, text("a") + struct.pack("<Q", 9999))]), "past"),
    "alignment zero": (gguf_bytes([*KEYS, number("general.alignment", 0)]), "general.alignment is 0"),
    "alignment three": (gguf_bytes([*KEYS, number("general.alignment", 3)]), "general.alignment is 3"),
    "alignment huge": (gguf_bytes([*KEYS, number("general.alignment", 2**31)]), "general.alignment"),
    "alignment a string": (
        gguf_bytes([*KEYS, text("general.alignment") + struct.pack("<I", 8) + text("x")]),
        "general.alignment",
    ),
    "no dimensions": (gguf_bytes(tensors=[tensor("token_embd.weight", [])]), "0 dimensions"),
    "too many dimensions": (gguf_bytes(tensors=[tensor("token_embd.weight", [1] * 5)]), "5 dimensions"),
    "huge dimension count": (gguf_bytes(tensors=[text("a") + struct.pack("<I", 2**32 - 1)]), "dimensions"),
    "zero dimension": (gguf_bytes(tensors=[tensor("token_embd.weight", [0, 4])]), "impossible shape"),
    "huge shape": (gguf_bytes(tensors=[tensor("token_embd.weight", [2**40, 2**40])]), "larger than the file"),
    "overflowing shape": (gguf_bytes(tensors=[tensor("token_embd.weight", [2**62, 4])]), "larger than the file"),
    "row not whole blocks": (gguf_bytes(tensors=[tensor("token_embd.weight", [33, 4], 2)]), "impossible shape"),
    "past the end": (gguf_bytes(tensors=[tensor("token_embd.weight", [8, 4], 0, 32)]), "truncated"),
    "offset past the end": (gguf_bytes(tensors=[tensor("token_embd.weight", [8, 4], 0, 2**62)]), "truncated"),
    "offset of all ones": (gguf_bytes(tensors=[tensor("token_embd.weight", [8, 4], 0, 2**64 - 32)]), "truncated"),
    "offset not aligned": (gguf_bytes(tensors=[tensor("token_embd.weight", [8], 0, 4)]), "not aligned"),
    "tensor twice": (gguf_bytes(tensors=[EMBEDDING, EMBEDDING]), "stands twice"),
    "overlap": (gguf_bytes(tensors=[EMBEDDING, tensor("output.weight", [8], 0, 32)]), "overlaps"),
    "unsupported type": (gguf_bytes(tensors=[tensor("token_embd.weight", [256, 4], 23)]), "IQ4_XS"),
    "unknown type": (gguf_bytes(tensors=[tensor("token_embd.weight", [8, 4], 2**31)]), "ggml type 2147483648"),
    "unknown tensor": (gguf_bytes(tensors=[tensor("blk.0.ffn_gate_exps.weight", [8, 4])]), "ffn_gate_exps"),
    "layer number of another spelling": (gguf_bytes(tensors=[tensor("blk.00.attn_q.weight", [8])]), "blk.00"),
    "no architecture": (gguf_bytes(SIZES), "architecture None"),
    "unknown architecture": (
        gguf_bytes([text("general.architecture") + struct.pack("<I", 8) + text("gptj")]),
        "architecture 'gptj'",
    ),
    "architecture a number": (gguf_bytes([number("general.architecture", 4)]), "architecture 4"),
    "missing size": (gguf_bytes([ARCHITECTURE, *SIZES[:2]]), "is missing"),
    "zero heads": (gguf_bytes([ARCHITECTURE, *SIZES[:4], number("llama.attention.head_count", 0)]), "not a size"),
    "size a negative int8": (
        gguf_bytes([ARCHITECTURE, *SIZES[1:], text("llama.embedding_length") + struct.pack("<Ib", 1, -1)]),
        "not a size",
    ),
    "rope base NaN": (gguf_bytes([*KEYS, float_key("llama.rope.freq_base", float("nan"))]), "not a positive number"),
    "epsilon infinite": (
        gguf_bytes([*KEYS, float_key("llama.attention.layer_norm_rms_epsilon", float("inf"))]),
        "not a positive number",
    ),
    "layers of many sizes": (
        gguf_bytes([ARCHITECTURE, *SIZES[:4], array("llama.attention.head_count", 4, 2, struct.pack("<II", 2, 4))]),
        "not a size",
    ),
    "rope factors of another length": (
        with_rope_factors(8),
        "rope_freqs.weight",
    ),
    "rope factors zero": (
        with_rope_factors(2),
        "not positive",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_base_of_the_hostile_files_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    for version in (2, 3):
        path.write_bytes(gguf_bytes([*KEYS, nested(2)], version=version))
        assert open_checkpoint(path).load("model.embed_tokens.weight").shape == (4, 8)


def test_query_rows_that_heads_do_not_divide(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    query = tensor("blk.0.attn_q.weight", [8, 3], offset=128)
    path.write_bytes(gguf_bytes(tensors=[EMBEDDING, query], data=bytes(256)))
    with pytest.raises(ModelFileError, match="3 rows"):
        open_checkpoint(path).load("model.layers.0.self_attn.q_proj.weight")


@pytest.fixture(scope="module")
def whole_file(tiny_model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return build_gguf(tiny_model_dir("llama"), path, Quant.Q4_1, rope_factors=True).read_bytes()


def read_everything(path: Path) -> None:
    for _, loaded in iterate(open_checkpoint(path)):
        loaded.sum()


@quick
@given(cut=st.integers(0, 2**31))
def test_a_truncated_file_is_refused(tmp_path: Path, whole_file: bytes, cut: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole_file[: cut % (len(whole_file) - 32)])
    with pytest.raises(ModelFileError):
        read_everything(path)


def any_bytes() -> st.SearchStrategy[Any]:
    interesting = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
    return st.one_of(
        st.binary(min_size=1, max_size=8),
        interesting.map(lambda value: value.to_bytes(8, "little")),
        interesting.map(lambda value: (value % 2**32).to_bytes(4, "little")),
    )


@quick
@given(edits=st.lists(st.tuples(st.integers(0, 2**31), any_bytes()), min_size=1, max_size=4), everywhere=st.booleans())
def test_a_mutated_file_is_refused_or_read_within_bounds(
    tmp_path: Path, whole_file: bytes, edits: list[tuple[int, bytes]], everywhere: bool
) -> None:
    content = bytearray(whole_file)
    reach = len(content) if everywhere else 4000  # the counts, sizes and key names stand at the start
    for position, value in edits:
        start = position % (reach - 8)
        content[start : start + len(value)] = value
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    with contextlib.suppress(ModelFileError):
        read_everything(path)
