"""A config that asks for 8-bit keys and values: which cache runs, what it says, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

from powertrain.checkpoint.compressed_tensors import quantization_config, scheme_of
from powertrain.checkpoint.kv_cache import KVCacheScheme, kv_cache_kind, stored_cache_dtype
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import iterate, open_checkpoint
from powertrain.config import EngineConfig
from powertrain.engine.core import Engine
from powertrain.kernels import native
from powertrain.measure.scoring import read_model
from powertrain.types import ModelFileError
from quantized_builders import InMemory

IDS = torch.arange(80) * 13 % 300
SOUND: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def folder_with(scheme: KVCacheScheme, source: Path, out: Path) -> Path:
    """The model of `source`, dense, with an 8-bit cache asked for and scales beside it."""
    checkpoint = open_checkpoint(source)
    tensors = dict(iterate(checkpoint))
    shape = scheme.scale_shape(checkpoint.config["num_key_value_heads"])
    for index in range(checkpoint.config["num_hidden_layers"]):
        tensors |= {f"model.layers.{index}.self_attn.{part}": torch.full(shape, 0.1) for part in ("k_scale", "v_scale")}
    write_checkpoint(
        out, checkpoint.config | {"quantization_config": quantization_config([], [], scheme)}, tensors.items()
    )
    return out


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_an_engine_left_to_choose_takes_the_files_type(
    tiny_model_dir: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: Any,
) -> None:
    folder = folder_with(KVCacheScheme(kind), tiny_model_dir("llama3"), tmp_path / "model")
    caplog.set_level(logging.INFO)
    engine = Engine.from_checkpoint(folder, EngineConfig.from_options(device="cpu", kernels="reference"))
    assert engine.model.kv_cache_dtype == kind
    assert [f"model: kv_cache_scheme asks for 8 bits: keys and values are kept in {kind}, each with a scale of its" in
            line for line in caplog.messages] == [True]  # fmt: skip
    # judged as it is served, by scales that are finer than the file's
    plain, stored = (read_model(path, kernels="reference").decoder for path in (tiny_model_dir("llama3"), folder))
    assert torch.equal(stored.score(IDS, 16), plain.with_kv_cache_dtype(kind).score(IDS, 16))
    assert not torch.equal(stored.score(IDS, 16), plain.score(IDS, 16))


def test_a_type_that_is_given_goes_first_and_says_nothing(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_with(KVCacheScheme("int8", "attn_head"), tiny_model_dir("llama"), tmp_path / "model")
    caplog.set_level(logging.INFO)
    read = read_model(folder, kernels="reference", kv_cache_dtype="float32")
    assert read.kv_cache_dtype == "float32"
    assert not caplog.messages


def test_the_native_kernels_take_integers_for_floats(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    if native.unavailable() is not None:
        pytest.skip("the native kernels are not built")
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))
    folder = folder_with(KVCacheScheme("fp8"), tiny_model_dir("llama3"), tmp_path / "model")
    caplog.set_level(logging.INFO)
    read = read_model(folder, kernels="native")
    assert read.kv_cache_dtype == "int8"
    assert any("in int8 in place of fp8, which these kernels do not have" in line for line in caplog.messages)
    plain = read_model(tiny_model_dir("llama3"), kernels="native", kv_cache_dtype="int8")
    assert torch.equal(read.decoder.score(IDS), plain.decoder.score(IDS))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_what_is_written_is_the_librarys_field_and_read_back(kind: Any, strategy: Any) -> None:
    scheme = KVCacheScheme(kind, strategy)
    written = quantization_config([], [], scheme)
    theirs = QuantizationConfig.model_validate(written).kv_cache_scheme
    assert theirs == QuantizationArgs(num_bits=8, type="float" if kind == "fp8" else "int", strategy=strategy)
    assert kv_cache_kind(written) == kind
    assert kv_cache_kind({"kv_cache_scheme": theirs.model_dump()}) == kind
    assert scheme_of({"quantization_config": written}, "model.layers.0.mlp.up_proj") is None


def test_configs_of_others_leave_the_cache_alone() -> None:
    for quantization in (None, {"quant_method": "fp8", "kv_cache_scheme": SOUND}, quantization_config([], [])):
        assert stored_cache_dtype(InMemory({}, quantization), has_float8=True) == "auto"


def test_scales_found_for_each_token_are_no_finer_than_ours() -> None:
    assert kv_cache_kind({"kv_cache_scheme": SOUND | {"strategy": "token", "dynamic": True}}) == "fp8"


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (SOUND | {"num_bits": 4}, "kv_cache_scheme: only symmetric int or float of 8 bits can be run"),
        (SOUND | {"type": "complex"}, "kv_cache_scheme: only symmetric int or float of 8 bits can be run"),
        (SOUND | {"symmetric": False}, "kv_cache_scheme: only symmetric int or float of 8 bits can be run"),
        (SOUND | {"strategy": "channel"}, "kv_cache_scheme: strategy 'channel' cannot be run; tensor, attn_head and"),
        (["fp8"], "kv_cache_scheme is a list, expected a mapping"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(scheme: Any, message: str) -> None:
    config = {"quantization_config": quantization_config([], []) | {"kv_cache_scheme": scheme}}
    with pytest.raises(ModelFileError, match=f"quantization_config: {message}"):
        scheme_of(config, "model.layers.0.mlp.up_proj")
