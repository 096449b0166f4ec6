"""The engine on the native kernels: a request's tokens depend neither on its batch nor on the threads. No tie rule."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from powertrain.checkpoint.load import load_decoder
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import EngineConfig, resolve
from powertrain.engine.core import Engine
from powertrain.kernels import native
from powertrain.model.decoder import Decoder
from powertrain.types import PowertrainError, Request, SamplingParams

pytestmark = pytest.mark.skipif(native.load() is None, reason=f"no native kernels: {native.unavailable()}")

Models = Callable[..., Decoder]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def native_model(tiny_gguf: Callable[[str, str], Path]) -> Models:
    """`native_model(family, type_name, threads)`: a tiny GGUF file on the native kernels, loaded once."""
    loaded: dict[tuple[str, str, int], Decoder] = {}

    def get(family: str = "llama", type_name: str = "Q8_0", threads: int = 2) -> Decoder:
        key = (family, type_name, threads)
        if key not in loaded:
            options = EngineConfig.from_options(device="cpu", kernels="native", threads=threads)
            config = resolve(options, has_cuda=False, model_dtype="float32")
            loaded[key] = load_decoder(open_checkpoint(tiny_gguf(family, type_name)), config)
        return loaded[key]

    return get


def prompts(count: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Random ids, 1 to 60; every third begins with as much of one text as blocks of 16 can share."""
    source = random.Random(seed)
    shared = [source.randrange(5, vocab) for _ in range(40)]
    made = []
    for at in range(count):
        own = [source.randrange(5, vocab) for _ in range(source.randint(1, 60))]
        made.append(shared[: source.choice((16, 33, 40))] + own if at % 3 == 0 else own)
    return made


def sampling(at: int) -> SamplingParams:
    """Half greedy; the others by each way a token is drawn."""
    ways: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.9, "repetition_penalty": 1.1},
        {"temperature": 0.0},
        {"temperature": 0.0, "frequency_penalty": 0.2},
    )
    return SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, seed=at, **ways[at % len(ways)])


def run(model: Decoder, texts: dict[int, list[int]], **options: Any) -> tuple[dict[int, list[int]], Engine]:
    """Tokens by number of all `texts` together in one engine."""
    engine = Engine(model, EngineConfig.from_options(device="cpu", kernels="native", **options), "tiny")
    for at, text in texts.items():
        engine.add(Request(request_id=str(at), prompt_token_ids=tuple(text), sampling=sampling(at)))
    tokens: dict[int, list[int]] = {at: [] for at in texts}
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            tokens[int(output.request_id)] += output.token_ids
        engine.scheduler.check()
    return tokens, engine


CASES = [
    ("llama", "Q8_0", "auto", 100),
    ("llama", "Q8_0", "int8", 100),
    ("llama", "Q4_0", "float32", 50),
    ("llama3", "Q4_1", "float16", 25),
    ("mistral", "Q8_0", "int8", 25),
    ("qwen2", "F16", "float16", 25),
    ("qwen3", "F32", "int8", 25),
]


@pytest.mark.parametrize(("family", "type_name", "kv_cache_dtype", "count"), CASES)
def test_alone_equals_in_any_company(
    native_model: Models, family: str, type_name: str, kv_cache_dtype: str, count: int
) -> None:
    """Alone on one thread = in a full, chunked, preempted, prefix-cached, speculating batch on two: every token."""
    model, single = native_model(family, type_name), native_model(family, type_name, threads=1)
    texts = dict(enumerate(prompts(count, model.config.vocab_size)))
    kind = {"kv_cache_dtype": kv_cache_dtype}
    alone: dict[int, list[int]] = {}
    for at, text in texts.items():
        alone |= run(single, {at: text}, num_blocks=20, enable_prefix_caching=False, **kind)[0]
    crowd = {"num_blocks": 28, "max_num_batched_tokens": 32, "max_num_seqs": 12, **kind}
    for extra in ({}, {"num_speculative_tokens": 3}):
        together, engine = run(model, texts, **crowd, **extra)
        assert engine.stats().num_preemptions > 0
        assert engine.stats().prefix_cache_hits > 0
        assert together == alone


@pytest.mark.parametrize("kv_cache_dtype", ["float16", "int8"])
def test_the_number_of_threads_changes_no_token(native_model: Models, kv_cache_dtype: str) -> None:
    found = []
    for threads in (1, 2, 3):
        model = native_model("llama", "Q8_0", threads)
        texts = dict(enumerate(prompts(40, model.config.vocab_size, seed=1)))
        found.append(run(model, texts, num_blocks=300, kv_cache_dtype=kv_cache_dtype)[0])
    assert found[0] == found[1] == found[2]


def test_the_cache_type_sets_the_size_of_the_pool(native_model: Models) -> None:
    sizes = {
        kind: native_model().with_kv_cache_dtype(kind).kv_bytes_per_token() for kind in ("int8", "float16", "float32")
    }
    assert sizes["int8"] < sizes["float16"] < sizes["float32"]
    engine = Engine(native_model(), EngineConfig.from_options(device="cpu", kv_cache_dtype="int8"), "tiny")
    assert engine.model.kv_cache_dtype == "int8"
    assert engine.info.kernels == native.describe()


def test_a_block_the_kernels_cannot_read_is_refused(native_model: Models) -> None:
    with pytest.raises(PowertrainError, match="block_size must be a multiple of 16"):
        Engine(native_model(), EngineConfig.from_options(device="cpu", kernels="native", block_size=8), "tiny")
