"""Exported GGUF files: blocks judged by the `gguf` package's writer, logits by our engine's and by llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_builder import ROPE_FACTORS, build_gguf
from powertrain.checkpoint.export_gguf import TYPES, export_gguf
from powertrain.checkpoint.gguf import GGUFCheckpoint
from powertrain.checkpoint.gguf_blocks import dequantize
from powertrain.checkpoint.gguf_write import write_gguf
from powertrain.checkpoint.plain import read_weight, weight_shapes
from powertrain.checkpoint.quantized import QuantizedMatrix
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.compress import compress
from powertrain.model.families import model_config
from powertrain.types import ModelFileError, PowertrainError

TinyModel = Callable[[str], Path]
Quant = gguf.GGMLQuantizationType
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
TEXT = "Once upon a time, 12 engines\n  pulled  café carts\t🚀 </s> it's"


def export(model: Path, out: Path, type_name: str, **options: Any) -> Any:
    return export_gguf(open_checkpoint(model), out, type_name, **options)


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    reader = gguf.GGUFReader(path)
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in reader.tensors}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("type_name", ["f32", "q8_0"])
def test_blocks_are_those_that_the_packages_writer_puts_there(
    tiny_model_dir: TinyModel, tmp_path: Path, family: str, type_name: str
) -> None:
    folder = tiny_model_dir(family)
    export(folder, tmp_path / "ours.gguf", type_name)
    ours = tensors_of(tmp_path / "ours.gguf")
    theirs = tensors_of(build_gguf(folder, tmp_path / "theirs.gguf", Quant[type_name.upper()]))
    factors = ours.pop("rope_freqs.weight", None)
    assert (factors is not None) == (family == "llama3")
    assert ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_tokenizer_come_back(tiny_model_dir: TinyModel, tmp_path: Path, family: str) -> None:
    folder = tiny_model_dir(family)
    export(folder, tmp_path / "m.gguf", "f16")
    original, back = open_checkpoint(folder), open_checkpoint(tmp_path / "m.gguf")
    before, after = model_config(original.config), model_config(back.config)
    for name in before.__dataclass_fields__:
        if name not in ("dtype", "rope_scaling"):
            assert getattr(before, name) == getattr(after, name), name
    ours, theirs = load_tokenizer(tmp_path / "m.gguf"), load_tokenizer(folder)
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.special_tokens == theirs.special_tokens
    assert ours.chat_template is not None
    assert theirs.chat_template is not None
    assert ours.chat_template.source == theirs.chat_template.source


def logits_of(model: Path, ids: list[int]) -> torch.Tensor:
    from powertrain.checkpoint.load import load_model

    return load_model(open_checkpoint(model), "cpu", torch.float32).score(torch.tensor(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_our_engine_runs_the_file_to_equal_logits(tiny_model_dir: TinyModel, tmp_path: Path, family: str) -> None:
    folder = tiny_model_dir(family)
    export(folder, tmp_path / "m.gguf", "f32")
    ids = list(range(5, 65))
    torch.testing.assert_close(logits_of(tmp_path / "m.gguf", ids), logits_of(folder, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type_is_written_and_read_back(tiny_model_dir: TinyModel, tmp_path: Path, type_name: str) -> None:
    folder = tiny_model_dir("qwen2")
    report = export(folder, tmp_path / "m.gguf", type_name)
    back = open_checkpoint(tmp_path / "m.gguf")
    assert isinstance(back, GGUFCheckpoint)
    for name in back.names():
        stored, rows, shape = back.raw(name)
        ours = back.load(name)
        assert torch.equal(ours, torch.from_numpy(gguf.quants.dequantize(rows, Quant[stored])).view(shape)), name
        wanted = open_checkpoint(folder).load(name)
        assert float((ours - wanted).square().sum() / wanted.square().sum()) < 0.01, name
    # rows of 64 and 96 hold no super-block: what took its place is told
    replaced = {"q6_k": "Q8_0", "q5_k": "Q5_1", "q4_k": "Q5_0", "q3_k": "Q4_0", "q2_k": "Q4_0"}
    if type_name in replaced:
        assert f"{replaced[type_name]} for {type_name.upper()} in rows of 96" in report.summary()
    assert sum(report.types.values()) == 15


@pytest.mark.parametrize(
    ("recipe", "group_size", "type_name"),
    [
        ("W4A16", 32, "Q4_0"),
        ("W4A16_ASYM", 32, "Q4_1"),
        ("W8A16", 32, "Q8_0"),
        ("W4A16", "channel", "Q4_0"),
        ("W5A16", 32, "Q5_0"),
    ],
)
def test_integers_are_not_rounded_twice(
    tiny_model_dir: TinyModel, tmp_path: Path, recipe: str, group_size: int | str, type_name: str
) -> None:
    """Scales of float16 fit; so do the minima to their last digit but one."""
    step = {"match": "Linear", "method": "rtn", "scheme": recipe, "group_size": group_size}
    compress(tiny_model_dir("llama"), tmp_path / "c", {"steps": [step]}, dtype="float16")
    source = open_checkpoint(tmp_path / "c")
    for wanted in ("as-is", type_name.lower()):
        report = export(tmp_path / "c", tmp_path / f"{wanted}.gguf", wanted)
        assert len(report.moved) == 14
        assert not report.rounded_again
    back = GGUFCheckpoint(tmp_path / "as-is.gguf")
    for name, shape in weight_shapes(model_config(source.config)).items():
        stored = read_weight(source, name, shape)
        if not isinstance(stored, QuantizedMatrix):
            assert torch.equal(back.load(name), stored.float())
            continue
        assert back.raw(name)[0] == type_name
        expected = stored.weight.dequantize()
        if recipe == "W4A16_ASYM":
            largest = float(expected.abs().max())
            torch.testing.assert_close(back.load(name), expected, rtol=0, atol=largest * 2**-11)
        else:
            assert torch.equal(back.load(name), expected)


def test_what_no_block_holds_is_rounded_anew_and_told(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    compress(tiny_model_dir("llama"), tmp_path / "c", "FP8_DYNAMIC")
    report = export(tmp_path / "c", tmp_path / "m.gguf", "as-is")
    assert report.types == {"Q8_0": 14, "BF16": 1}
    assert "rounded a second time: 14 matrices" in report.summary()
    assert "rounds activations" in report.summary()
    again = export(tmp_path / "m.gguf", tmp_path / "again.gguf", "q4_0", overwrite=True)
    assert len(again.rounded_again) == 15 - 1


@pytest.mark.parametrize("type_name", ["Q4_1", "Q8_0", "F16"])
def test_a_file_of_the_wanted_type_is_moved(tiny_model_dir: TinyModel, tmp_path: Path, type_name: str) -> None:
    original = build_gguf(tiny_model_dir("llama"), tmp_path / "a.gguf", Quant[type_name], rope_factors=True)
    for wanted in (type_name.lower(), "as-is"):
        export(original, tmp_path / "b.gguf", wanted, overwrite=True)
        assert tensors_of(tmp_path / "b.gguf") == tensors_of(original)
    back, before = GGUFCheckpoint(tmp_path / "b.gguf"), GGUFCheckpoint(original)
    assert back.config["rope_factors"] == ROPE_FACTORS
    assert {key: back.metadata[key] for key in before.metadata} == before.metadata


def test_the_default_models_file_comes_back(smollm2_gguf: Path, tmp_path: Path) -> None:
    report = export(smollm2_gguf, tmp_path / "b.gguf", "q4_1")
    made, original = GGUFCheckpoint(tmp_path / "b.gguf"), GGUFCheckpoint(smollm2_gguf)
    assert made.metadata == original.metadata
    for name in original.names():  # the package's reader takes seconds for a vocabulary of this size
        (ours, our_rows, _), (theirs, their_rows, _) = made.raw(name), original.raw(name)
        assert ours == theirs
        assert np.array_equal(our_rows, their_rows), name
    assert report.notes == ["Q8_0 for the head: 1 matrices", "blocks or integers moved as they are: 211 matrices"]


def test_a_sentencepiece_tokenizer_comes_back(stories260k_dir: Path, tmp_path: Path) -> None:
    export(stories260k_dir, tmp_path / "m.gguf", "f32")
    ours, theirs = load_tokenizer(tmp_path / "m.gguf"), load_tokenizer(stories260k_dir)
    for text in ("Once upon a time, Lily went out.", TEXT, "", " two  spaces "):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.bos_token_id == theirs.bos_token_id == ours.encode("x")[0]


def test_a_tokenizer_that_gguf_has_no_name_for_is_refused(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, state["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ModelFileError, match="way of splitting text has no GGUF name"):
        export(folder, tmp_path / "m.gguf", "f32")
    assert not (tmp_path / "m.gguf").exists()


def test_an_interrupted_export_leaves_nothing(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    def stop(what: str, done: float, total: float | None) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny_model_dir("llama"), tmp_path / "m.gguf", "q8_0", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_outputs_and_types_that_cannot_be_are_refused(tiny_model_dir: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model_dir("llama")
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(PowertrainError, match="exists already: --overwrite"):
        export(folder, tmp_path / "m.gguf", "q8_0")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"
    with pytest.raises(PowertrainError, match="give the name of a file"):
        export(folder, tmp_path, "q8_0", overwrite=True)
    with pytest.raises(PowertrainError, match="'q9_z' is unknown; known: f32"):
        export(folder, tmp_path / "n.gguf", "q9_z")


values = st.one_of(
    st.text(max_size=20),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1).filter(lambda n: n < 2**63 or n >= 0),
    st.floats(width=32, allow_nan=False),
    st.lists(st.text(max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=1, max_size=4),
)


@settings(max_examples=80, deadline=None)
@given(
    metadata=st.dictionaries(st.from_regex(r"x\.[a-z]{1,9}", fullmatch=True), values, max_size=5),
    rows=st.integers(1, 5),
)
def test_containers_are_read_by_the_package(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any], rows: int
) -> None:
    path = tmp_path_factory.mktemp("c") / "m.gguf"
    one = np.random.default_rng(rows).normal(size=(rows, 33)).astype(np.float32)
    two = np.arange(64, dtype=np.float32).reshape(2, 32)
    shapes = {"one.weight": one.shape, "two.weight": two.shape}
    blocks = gguf.quants.quantize(two, Quant.Q8_0)
    tensors = [("one.weight", ("F32", one.view(np.uint8))), ("two.weight", ("Q8_0", blocks))]
    assert write_gguf(path, metadata, shapes, tensors) == {"one.weight": "F32", "two.weight": "Q8_0"}
    reader = gguf.GGUFReader(path)
    assert {key: reader.get_field(key).contents() for key in metadata} == metadata
    first, second = reader.tensors
    assert np.array_equal(first.data, one)
    assert np.array_equal(second.data, blocks)
    assert [tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors] == list(shapes.values())
    assert torch.equal(
        dequantize("Q8_0", np.array(second.data)), torch.from_numpy(gguf.quants.dequantize(blocks, Quant.Q8_0))
    )
