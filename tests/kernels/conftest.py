"""Tiny models on the native kernels, for the tests of the native decoder."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from native_builders import NATIVE
from powertrain.checkpoint.load import load_decoder
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import EngineConfig, resolve
from powertrain.model.native_decoder import Backend, NativeDecoder

collect_ignore = [] if find_spec("triton") else ["test_gpu_kernels.py"]

Models = Callable[..., NativeDecoder]


@pytest.fixture(scope="session")
def native_model(tiny_model_dir: Callable[[str], Path], tiny_gguf: Callable[[str, str], Path]) -> Models:
    """`native_model((family, type), level, threads)`: a tiny model, float32 or of that GGUF type, on such a team."""
    loaded: dict[tuple[str, str], NativeDecoder] = {}

    def get(name: tuple[str, str], level: str = "", threads: int = 2) -> NativeDecoder:
        if name not in loaded:
            family, type_name = name
            path = tiny_gguf(family, type_name) if type_name else tiny_model_dir(family)
            options = EngineConfig.from_options(device="cpu", kernels="native", threads=1)
            config = resolve(options, has_cuda=False, model_dtype="float32")
            decoder = load_decoder(open_checkpoint(path), config)
            assert isinstance(decoder, NativeDecoder)
            loaded[name] = decoder
        return on_team(loaded[name], NATIVE.Team(threads, level))

    return get


def on_team(decoder: NativeDecoder, team: Any) -> NativeDecoder:
    parts = (decoder.config, decoder.packed_embedding, decoder.blocks, decoder.norm, decoder.head, decoder.rope)
    return NativeDecoder(*parts, Backend(NATIVE, team))
