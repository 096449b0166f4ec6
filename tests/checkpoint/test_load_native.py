"""A checkpoint as the native decoder gets it: every matrix packed, in the right order, and read from disk once.

The compiled module is replaced by one that multiplies the unpacked streams with torch, so that what is tested is which
bytes stand where: the reference decoder runs on the native one's parts and must give the reference's logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from powertrain.checkpoint.load import load_decoder, load_model, random_decoder
from powertrain.checkpoint.safetensors_folder import SafetensorsCheckpoint, write_checkpoint
from powertrain.checkpoint.source import Checkpoint, iterate, open_checkpoint
from powertrain.compress import compress
from powertrain.config import EngineConfig, resolve
from powertrain.kernels import native
from powertrain.model.decoder import Decoder
from powertrain.model.native_decoder import NativeDecoder
from powertrain.model.packed import PackedLayout, PackedMatrix, unpack
from powertrain.types import ModelFileError, PowertrainError
from quantized_builders import Quantize, Tensors, awq_tensors, gptq_tensors, random_codes, write_pair

IDS = torch.arange(24) * 11 % 300


class FakeDecoder:
    def __init__(self, team: Any, **parts: Any) -> None:
        self.parts = parts
        self.layers: list[dict[str, Any]] = []

    def add_layer(self, **parts: Any) -> None:
        self.layers.append(parts)


def fake_matrix(stream: torch.Tensor, kind: str, rows: int, cols: int, **layout: Any) -> torch.Tensor:
    return unpack(stream, PackedLayout(kind, rows, cols, **layout))  # type: ignore[arg-type]


def fake_matmul(team: Any, matrix: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x @ matrix.t())


@pytest.fixture(autouse=True)
def fake_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = SimpleNamespace(
        Team=lambda threads: SimpleNamespace(threads=threads),
        Matrix=fake_matrix,
        matmul=fake_matmul,
        Decoder=FakeDecoder,
    )
    monkeypatch.setattr(native, "load", lambda: module)
    monkeypatch.setattr(native, "unavailable", lambda: None)
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))


def config(**options: Any) -> EngineConfig:
    return resolve(EngineConfig.from_options(device="cpu", **options), has_cuda=False, model_dtype="float32")


def on_the_reference(decoder: Decoder) -> Decoder:
    """The same parts under the reference's step."""
    assert isinstance(decoder, NativeDecoder)
    table = decoder.packed_embedding.unpack()
    return Decoder(decoder.config, table, decoder.blocks, decoder.norm, decoder.head, decoder.rope)


def check(path: Path, tolerance: float = 1e-4) -> NativeDecoder:
    checkpoint = open_checkpoint(path)
    decoder = load_decoder(checkpoint, config())
    expected = load_model(checkpoint, "cpu", torch.float32).score(IDS)
    assert (on_the_reference(decoder).score(IDS) - expected).abs().max() < tolerance
    assert isinstance(decoder, NativeDecoder)
    return decoder


@pytest.fixture
def copy_of(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A tiny model's folder that the cache file may be written to."""

    def copy(family: str) -> Path:
        left_by_others = shutil.ignore_patterns("*.packed")
        return Path(shutil.copytree(tiny_model_dir(family), tmp_path / family, ignore=left_by_others))

    return copy


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_every_family_keeps_its_logits(copy_of: Callable[[str], Path], family: str) -> None:
    decoder = check(copy_of(family))
    assert decoder.formats() == ["float32"]
    assert (decoder.head.formats[0] is decoder.packed_embedding) == decoder.config.ties_embeddings
    assert all(len(linear.formats) == 1 for linear in decoder.linears())


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "Q5_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_types_keep_their_logits_and_their_bytes(
    tiny_gguf: Callable[[str, str], Path], tmp_path: Path, family: str, type_name: str
) -> None:
    path = Path(shutil.copy(tiny_gguf(family, type_name), tmp_path / "tiny.gguf"))
    decoder = check(path)
    gguf_name = {"F16": "float16", "BF16": "bfloat16", "Q5_1": "float32"}.get(type_name, type_name.lower())
    assert gguf_name in decoder.formats()
    matrices = {name for name in open_checkpoint(path).names() if len(open_checkpoint(path).shape(name)) == 2}
    if type_name != "Q5_1":
        assert decoder.weight_bytes() == sum(open_checkpoint(path).nbytes(name) for name in matrices)


@pytest.mark.parametrize("recipe", ["W8A16", "W4A16", "W8A16_ASYM"])
def test_compressed_folders_keep_their_logits(copy_of: Callable[[str], Path], tmp_path: Path, recipe: str) -> None:
    group = {"group_size": 32} if recipe == "W4A16" else {}
    steps = [{"match": ["Linear", "lm_head"], "scheme": recipe, **group}]
    compress(copy_of("llama"), tmp_path / "out", {"steps": steps}, dtype="float32")  # the judge rounds to this
    decoder = load_decoder(open_checkpoint(tmp_path / "out"), config())
    names = {"W8A16": "int8", "W4A16": "int4 g32", "W8A16_ASYM": "int8"}
    assert decoder.formats() == [names[recipe]]
    assert isinstance(decoder, NativeDecoder)
    assert decoder.packed_embedding.name == "float32"
    judge = load_model(dequantized(tmp_path / "out", tmp_path / "dense"), "cpu", torch.float32)
    assert (on_the_reference(decoder).score(IDS) - judge.score(IDS)).abs().max() < 1e-4


def gptq_layer(bits: int, *, is_scattered: bool) -> Quantize:
    def quantize(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        made = random_codes(*weight.shape, 32, bits, is_scattered=is_scattered)
        return gptq_tensors(made), made.meaning()

    return quantize


def awq_layer(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    made = random_codes(*weight.shape, 32, 4)
    return awq_tensors(made), made.meaning()


def float8_layer(layer: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    values = weight.to(torch.float8_e4m3fn)
    scale = torch.full((1, 1), 1.3)
    return {"weight": values, "weight_scale_inv": scale}, values.float() * scale


GPTQ = {"quant_method": "gptq", "group_size": 32}
OTHERS: dict[str, tuple[dict[str, Any], Quantize, str]] = {
    "gptq 4 bits": (GPTQ | {"bits": 4}, gptq_layer(4, is_scattered=False), "int4 g32"),
    "gptq 8 bits": (GPTQ | {"bits": 8}, gptq_layer(8, is_scattered=False), "int8 g32"),
    "gptq act order": (GPTQ | {"bits": 4, "desc_act": True}, gptq_layer(4, is_scattered=True), "float32"),
    "awq": ({"quant_method": "awq", "group_size": 32}, awq_layer, "int4 g32"),
    "fp8": ({"quant_method": "fp8"}, float8_layer, "float32"),
}


@pytest.mark.parametrize(("manifest", "quantize", "name"), OTHERS.values(), ids=OTHERS)
def test_checkpoints_quantized_by_others_keep_the_logits_of_the_weights_they_mean(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, manifest: dict[str, Any], quantize: Quantize, name: str
) -> None:
    quantized, dense = write_pair(tiny_model_dir("llama"), tmp_path, manifest, quantize)
    decoder = load_decoder(open_checkpoint(quantized), config())
    expected = load_model(open_checkpoint(dense), "cpu", torch.float32).score(IDS)
    assert (on_the_reference(decoder).score(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert set(decoder.formats()) == {"float32", name}
    assert all(len(linear.formats) == 1 for linear in decoder.linears())


def dequantized(folder: Path, out: Path) -> Checkpoint:
    """The folder as float32, decoded by the compressed-tensors library."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    quantization = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]
    write_checkpoint(out, settings, model.state_dict().items())
    return open_checkpoint(out)


def test_mixed_schemes_give_several_matrices_in_order(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    steps = [
        {"match": ["re:.*k_proj", "re:.*up_proj"], "scheme": "W8A16"},
        {"match": ["re:.*q_proj", "re:.*down_proj"], "scheme": "W4A16", "group_size": 32},
    ]
    compress(copy_of("qwen2"), tmp_path / "out", {"steps": steps}, dtype="float32")
    decoder = load_decoder(open_checkpoint(tmp_path / "out"), config())
    block = decoder.blocks[0]
    assert [fmt.name for fmt in block.attention.qkv.formats] == ["int4 g32", "int8", "float32"]
    assert [fmt.name for fmt in block.mlp.gate_up.formats] == ["float32", "int8"]
    layouts = [fmt.layout for fmt in block.mlp.gate_up.formats if isinstance(fmt, PackedMatrix)]
    assert not any(layout.is_gate_up for layout in layouts)
    again = load_decoder(open_checkpoint(tmp_path / "out"), config())
    assert torch.equal(on_the_reference(again).score(IDS), on_the_reference(decoder).score(IDS))
    reference = load_model(open_checkpoint(tmp_path / "out"), "cpu", torch.float32).linears()
    for ours, theirs in zip(decoder.linears(), reference, strict=True):
        ours_whole, theirs_whole = (torch.cat([fmt.unpack() for fmt in part.formats]) for part in (ours, theirs))
        assert (ours_whole - theirs_whole).abs().max() < 5e-3  # theirs keeps 4-bit scales in bfloat16


def test_a_second_start_reads_no_matrix_of_the_source(
    copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("llama3")
    first = load_decoder(open_checkpoint(folder), config())
    loaded: list[str] = []
    load = SafetensorsCheckpoint.load

    def watched(self: SafetensorsCheckpoint, name: str) -> torch.Tensor:
        loaded.append(name)
        return load(self, name)

    monkeypatch.setattr(SafetensorsCheckpoint, "load", watched)
    progress: list[tuple[int, int]] = []
    second = load_decoder(open_checkpoint(folder), config(), lambda done, total: progress.append((done, total)))
    assert torch.equal(on_the_reference(first).score(IDS), on_the_reference(second).score(IDS))
    assert loaded
    assert all(name.endswith("norm.weight") or "layernorm" in name for name in loaded)
    assert progress == [(2, 2)]


def test_progress_counts_layers_while_packing(copy_of: Callable[[str], Path]) -> None:
    progress: list[tuple[int, int]] = []
    load_decoder(open_checkpoint(copy_of("mistral")), config(), lambda done, total: progress.append((done, total)))
    assert progress == sorted(progress)
    assert progress[-1] == (3, 3)
    assert {total for _, total in progress} == {3}


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({}, "native"),
        ({"kernels": "native"}, "native"),
        ({"kernels": "reference"}, "reference"),
        ({"dtype": "bfloat16"}, "reference"),
        ({"block_size": 8}, "reference"),
    ],
)
def test_the_configuration_chooses_the_kernels(
    copy_of: Callable[[str], Path], options: dict[str, Any], kernels: str
) -> None:
    decoder = load_decoder(open_checkpoint(copy_of("llama")), config(**options))
    assert decoder.kernels == kernels
    assert isinstance(decoder, NativeDecoder) == (kernels == "native")


def test_without_the_module_the_reference_runs_unless_native_is_asked_for(
    copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("llama")
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler")
    assert load_decoder(open_checkpoint(folder), config()).kernels == "reference"
    assert not list(folder.glob("*.packed"))
    with pytest.raises(PowertrainError, match=r"--kernels native .*no compiler"):
        load_decoder(open_checkpoint(folder), config(kernels="native"))


def test_a_missing_or_misshapen_matrix_is_named_and_nothing_is_cached(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_checkpoint(tiny_model_dir("llama"))
    name = "model.layers.1.mlp.up_proj.weight"

    def broken(out: Path, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Checkpoint:
        changed = ((key, change(value) if key == name else value) for key, value in iterate(source))
        write_checkpoint(out, source.config, ((key, value) for key, value in changed if value is not None))
        return open_checkpoint(out)

    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        load_decoder(broken(tmp_path / "a", lambda tensor: None), config())
    with pytest.raises(ModelFileError, match=r"up_proj\.weight has shape \[95, 64\], expected \[96, 64\]"):
        load_decoder(broken(tmp_path / "b", lambda tensor: tensor[1:]), config())
    assert not [
        file for folder in (tmp_path / "a", tmp_path / "b") for file in folder.iterdir() if "packed" in file.name
    ]


@pytest.mark.parametrize(("weight_format", "name"), [("none", "float32"), ("int8", "int8"), ("int4", "int4 g32")])
def test_random_weights_run_packed_and_leave_no_file(
    copy_of: Callable[[str], Path], tmp_path: Path, weight_format: Any, name: str
) -> None:
    folder = copy_of("llama")
    decoder = random_decoder(folder, config(), weight_format)
    assert name in decoder.formats()
    logits = on_the_reference(decoder).score(IDS)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1
    again = random_decoder(folder, config(), weight_format)
    assert torch.equal(on_the_reference(again).score(IDS), logits)
    assert not list(folder.glob("*.packed"))
    assert not (tmp_path / "cache").exists()
    assert random_decoder(folder, config(kernels="reference"), weight_format).kernels == "reference"
