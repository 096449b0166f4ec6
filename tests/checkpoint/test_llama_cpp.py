"""llama.cpp runs the GGUF files that we export: the same logits and the same greedy text. Skips without it.

llama-cpp-python is compiled for twenty minutes where it is installed, so it is in no extra.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from powertrain.checkpoint.export_gguf import export_gguf
from powertrain.checkpoint.gguf_blocks import BLOCKS
from powertrain.checkpoint.gguf_encode import encode
from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.compress import compress

llama_cpp = pytest.importorskip("llama_cpp")

TinyModel = Callable[[str], Path]
LENGTH = 96


def theirs(path: Path, **options: Any) -> Any:
    return llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, seed=0, verbose=False, **options)


def their_logits(path: Path, ids: list[int]) -> torch.Tensor:
    """With float32 keys and values, as ours."""
    float32 = int(gguf.GGMLQuantizationType.F32)
    model = theirs(path, logits_all=True, type_k=float32, type_v=float32)
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("type_name", ["f32", "q8_0"])
def test_logits_are_ours(tiny_model_dir: TinyModel, tmp_path: Path, family: str, type_name: str) -> None:
    path = tmp_path / "m.gguf"
    export_gguf(open_checkpoint(tiny_model_dir(family)), path, type_name)
    ids = list(range(5, 5 + LENGTH))
    ours = load_model(open_checkpoint(path), "cpu", torch.float32).score(torch.tensor(ids))
    found = their_logits(path, ids)
    # theirs rounds the inputs of quantized matrices to 8 bits
    assert float((found - ours).norm() / ours.norm()) < (1e-3 if type_name == "f32" else 6e-2)


def test_text_is_split_as_ours(tiny_model_dir: TinyModel, stories260k_dir: Path, tmp_path: Path) -> None:
    for folder in (tiny_model_dir("llama"), stories260k_dir):
        path = tmp_path / f"{folder.name}.gguf"
        export_gguf(open_checkpoint(folder), path, "f32")
        model = theirs(path, vocab_only=True)
        for text in ("Once upon a time, 12 engines", "it's  café\n 🚀", "The end."):
            assert model.tokenize(text.encode(), add_bos=True) == load_tokenizer(folder).encode(text)


def greedy(model: Path, prompt: str, count: int) -> str:
    tokenizer = load_tokenizer(model)
    decoder = load_model(open_checkpoint(model), "cpu", torch.float32)
    prompt_ids = tokenizer.encode(prompt)
    ids = list(prompt_ids)
    for _ in range(count):
        ids.append(int(decoder.score(torch.tensor(ids))[-1].argmax()))
    return tokenizer.decode(ids).removeprefix(tokenizer.decode(prompt_ids))


@pytest.mark.parametrize(("type_name", "count"), [("f32", 60), ("q8_0", 30)])  # theirs rounds inputs beside q8_0
def test_greedy_text_of_a_trained_model_is_ours(
    stories260k_dir: Path, tmp_path: Path, type_name: str, count: int
) -> None:
    path = tmp_path / "m.gguf"
    export_gguf(open_checkpoint(stories260k_dir), path, type_name)
    prompt = "Once upon a time, there was a little girl named Lily."
    answer = theirs(path).create_completion(prompt, max_tokens=count, temperature=0.0)
    assert answer["choices"][0]["text"] == greedy(path, prompt, count)


def test_integers_of_a_compressed_folder_run_there(stories260k_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    step = {"match": "re:.*self_attn", "method": "rtn", "scheme": "W4A16", "group_size": 32}
    compress(stories260k_dir, tmp_path / "c", {"steps": [step]}, dtype="float16")
    report = export_gguf(open_checkpoint(tmp_path / "c"), path, "as-is")
    assert len(report.moved) == 20
    ids = list(range(300, 300 + LENGTH))
    folder = load_model(open_checkpoint(tmp_path / "c"), "cpu", torch.float32).score(torch.tensor(ids))
    assert float((their_logits(path, ids) - folder).norm() / folder.norm()) < 3e-2


@pytest.mark.parametrize("type_name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("is_heavy", [False, True])
def test_k_blocks_lose_less_than_llama_cpps_own(type_name: str, is_heavy: bool) -> None:
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    rng = np.random.default_rng(1)
    weight = (rng.standard_t(2, (64, 512)) if is_heavy else rng.normal(size=(64, 512))).astype(np.float32)
    blocks = np.zeros((64, 2 * BLOCKS[type_name][0]), np.uint8)
    quant = gguf.GGMLQuantizationType[type_name]
    pointers = (ctypes.c_void_p(weight.ctypes.data), ctypes.c_void_p(blocks.ctypes.data))
    sizes = (ctypes.c_int64(0), ctypes.c_int64(64), ctypes.c_int64(512))
    assert library.ggml_quantize_chunk(int(quant), *pointers, *sizes, None) == blocks.size
    errors = [
        float(np.square(gguf.quants.dequantize(made, quant) - weight).sum())
        for made in (encode(type_name, torch.from_numpy(weight)), blocks)
    ]
    assert errors[0] < errors[1]


@pytest.mark.big
@pytest.mark.timeout(600)
@pytest.mark.parametrize("type_name", ["f16", "q8_0", "q4_1", "q4_k"])
def test_greedy_text_of_the_default_model_is_ours(smollm2_gguf: Path, tmp_path: Path, type_name: str) -> None:
    """To the letter in float16. Beside quantized matrices llama.cpp rounds activations, so it may part at near-ties."""
    path = tmp_path / "m.gguf"
    export_gguf(open_checkpoint(smollm2_gguf), path, type_name)
    prompt, count = "The capital of France is", 24
    answer = theirs(path).create_completion(prompt, max_tokens=count, temperature=0.0)["choices"][0]["text"]
    if type_name == "f16":
        assert answer == greedy(path, prompt, count)
        return
    tokenizer = load_tokenizer(path)
    start, ids = len(tokenizer.encode(prompt)), torch.tensor(tokenizer.encode(prompt + answer))
    logits = load_model(open_checkpoint(path), "cpu", torch.float32).score(ids)[start - 1 : -1]
    behind = logits.amax(-1) - logits.gather(1, ids[start:, None])[:, 0]
    assert float(behind.max()) < 0.5
    assert float((behind == 0).float().mean()) > 0.8
