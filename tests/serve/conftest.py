"""Servers that the tests share: one with the real engine and one with the fake per run, and a factory for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ServerProcess, Start

from model_builders import write_tiny_tokenizer


@pytest.fixture(scope="session")
def server(tiny_model_dir: Callable[[str], Path]) -> Iterator[ServerProcess]:
    """The real engine with a tiny random Llama: 512 tokens, 8 sequences."""
    engine = {"device": "cpu", "dtype": "float32", "num_blocks": 256, "max_num_seqs": 8, "threads": 1}
    process = ServerProcess(tiny_model_dir("llama"), engine, {"served_model_name": "tiny", "progress_timeout_s": 20})
    try:
        yield process.wait_ready()
        assert process.process.poll() is None, f"the shared server died: {''.join(process.stderr)[-3000:]}"
    finally:
        process.stop()


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def fake_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("fake-model")
    write_tiny_tokenizer(folder)
    return folder


@pytest.fixture
def start(fake_model_dir: Path) -> Iterator[Start]:
    """`start(step_ms=.., **server options)`: a server with the fake engine, stopped at the end of the test."""
    started: list[ServerProcess] = []

    def launch(step_ms: int = 1, max_num_seqs: int = 4, model: Path = fake_model_dir, **server: Any) -> ServerProcess:
        engine = {"seed": step_ms, "max_num_seqs": max_num_seqs}
        started.append(ServerProcess(model, engine, {"served_model_name": "fake", **server}, fake=True))
        return started[-1]

    yield launch
    for process in started:
        process.stop()
