"""Fixtures that several test folders share: tiny models of every family, and real data where this machine has it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model_builders import build_stories260k, build_tiny_model
from powertrain.config import cache_dir

if not torch.cuda.is_available():
    # read when triton is imported, by whatever test comes first; on a CPU no op takes a Triton kernel
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).parents[2] / "shared"
"""Data sets and small models kept beside the checkout. The one place that knows where; absent on most machines."""

SMOLLM2_GGUF = "models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The data folder beside the checkout; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("no shared data folder beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The default model's file in the cache; skips until `powertrain pull smollm2` has put it there."""
    path = cache_dir() / SMOLLM2_GGUF
    if not path.is_file():
        pytest.skip("the default model is not in the cache: run `powertrain pull smollm2`")
    return path


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The default model as a float32 folder of 540 MB, for judges that read GGUF slowly; only for `big` tests."""
    from powertrain.checkpoint.safetensors_folder import write_checkpoint
    from powertrain.checkpoint.source import iterate, open_checkpoint
    from powertrain.checkpoint.tokenizer_files import hugging_face_files

    source = open_checkpoint(smollm2_gguf)
    out = tmp_path_factory.mktemp("smollm2") / "model"
    write_checkpoint(out, source.config, iterate(source), hugging_face_files(smollm2_gguf))
    yield out
    shutil.rmtree(out)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model_dir(family)`: a folder with a seeded random float32 model and a working tokenizer, made once.

    Families: llama, llama3 (Llama-3 rope scaling, untied), mistral (sliding window 24), qwen2, qwen3.
    """
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = build_tiny_model(family, tmp_path_factory.mktemp("tiny") / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def tiny_gguf(
    tiny_model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """`tiny_gguf(family, type_name)`: the tiny model as a GGUF file, matrices as F32, F16, BF16, Q8_0, Q4_0 ..."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, type_name: str) -> Path:
        import gguf

        from gguf_builder import build_gguf

        key = (family, type_name)
        if key not in made:
            out = tmp_path_factory.mktemp("gguf") / f"{family}.{type_name}.gguf"
            made[key] = build_gguf(tiny_model_dir(family), out, gguf.GGMLQuantizationType[type_name])
        return made[key]

    return get


@pytest.fixture(scope="session")
def stories260k_dir(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained 260 thousand parameter Llama as a Hugging Face folder with `tokenizer.json`; skips where absent."""
    source = shared_dir / "models" / "stories260k"
    if not source.is_dir():
        pytest.skip("stories260k is not in the shared data folder")
    return build_stories260k(source, tmp_path_factory.mktemp("stories260k"))
