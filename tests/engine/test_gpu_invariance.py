"""`deterministic` on a CUDA device: tokens and log-probabilities, to the bit, alone and in any batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from powertrain.checkpoint.load import load_decoder, random_decoder
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import EngineConfig, resolve
from powertrain.engine.core import Engine
from powertrain.model.decoder import Decoder
from powertrain.types import Request, SamplingParams, TokenOutput

pytestmark = pytest.mark.gpu

Said = dict[str, list[tuple[int, float]]]


def settings(**options: object) -> EngineConfig:
    return EngineConfig.from_options(device="cuda", dtype="bfloat16", deterministic=True, **options)


def ready(model: Decoder, **options: object) -> Engine:
    engine = Engine(model, settings(**options), "tiny")
    engine.warm_up()
    return engine


def requests(count: int) -> list[Request]:
    """Half of them share a beginning; some are drawn, all with the log-probability of each token."""
    source = random.Random(7)
    beginning = [source.randrange(5, 320) for _ in range(48)]
    made = []
    for at in range(count):
        own = [source.randrange(5, 320) for _ in range(source.randint(1, 60))]
        sampling = SamplingParams(
            temperature=0.0 if at % 3 else 0.8, seed=at, max_tokens=20, logprobs=0 if at % 2 else None, ignore_eos=True
        )
        prompt = tuple(beginning + own if at % 2 else own)
        made.append(Request(request_id=str(at), prompt_token_ids=prompt, sampling=sampling))
    return made


def run(engine: Engine, wanted: list[Request]) -> Said:
    said: Said = {request.request_id: [] for request in wanted}

    def note(output: TokenOutput) -> None:
        assert output.error is None
        chances = [entry.logprob for entry in output.logprobs] if output.logprobs else [0.0] * len(output.token_ids)
        said[output.request_id] += zip(output.token_ids, chances, strict=True)

    for request in wanted:
        engine.add(request)
    while engine.has_work():
        for output in engine.step():
            note(output)
    return said


def load(folder: Path, weights: str) -> Decoder:
    config = resolve(settings(), has_cuda=True, model_dtype="bfloat16")
    if weights == "stored":
        return load_decoder(open_checkpoint(folder), config)
    return random_decoder(folder, config, weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", ["stored", "int4", "int8", "fp8"])
def test_a_request_is_answered_alike_alone_and_in_any_batch(
    tiny_model_dir: Callable[[str], Path], weights: str
) -> None:
    model = load(tiny_model_dir("llama"), weights)
    wanted = requests(14)
    plain = ready(model, num_blocks=200, enable_prefix_caching=False)
    alone: Said = {}
    for request in wanted:
        alone |= run(plain, [request])
    crowd: dict[str, dict[str, object]] = {
        "together": {"num_blocks": 200},
        "small chunks": {"num_blocks": 200, "max_num_batched_tokens": 17},
        "preempted": {"num_blocks": 26, "max_num_seqs": 10},
        "8-bit cache": {"num_blocks": 200, "kv_cache_dtype": "fp8"},
    }
    for name, options in crowd.items():
        engine = ready(model, **options)
        found = run(engine, wanted)
        if name == "8-bit cache":
            assert found == run(ready(model, **options, max_num_batched_tokens=23), wanted)
            continue
        assert found == alone, name
        if name == "preempted":
            assert engine.stats().num_preemptions > 0


def test_drafts_change_no_bit(tiny_model_dir: Callable[[str], Path]) -> None:
    model = load(tiny_model_dir("llama"), "stored")
    wanted = requests(6)
    expected = run(ready(model, num_blocks=200), wanted)
    assert run(ready(model, num_blocks=200, num_speculative_tokens=3), wanted) == expected
