"""The GPU's runner, planning ahead, on a CPU: its own inputs, draws and counts under Triton's interpreter.

The model is the reference, and a graph is its step run anew; all else is what a GPU runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from pathlib import Path

import pytest
import torch

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import EngineConfig
from powertrain.engine import core
from powertrain.engine.core import Engine
from powertrain.engine.gpu_runner import GpuRunner, Launched
from powertrain.engine.graph import RowInputs, decode_step
from powertrain.engine.scheduler import Sequence
from powertrain.model.decoder import Decoder, KVCache
from powertrain.types import Request, SamplingParams

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning"),  # the interpreter's own
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the runner itself"),
]


class Past:
    def synchronize(self) -> None:
        """What it stands for is over."""


class StepsAgain:
    """Graphs without capture: steps of exactly their rows, since the reference takes no padding."""

    def __init__(self, runner: GpuRunner) -> None:
        self.runner = runner
        self.num_replays = 0

    def size_for(self, num_rows: int) -> int:
        return num_rows

    def replay(self, size: int, inputs: RowInputs) -> torch.Tensor:
        self.num_replays += 1
        copied = RowInputs(inputs.numbers.clone())
        return decode_step(self.runner.model, self.runner.cache, self.runner._state, copied)


class HostRunner(GpuRunner):
    def __init__(self, model: Decoder, cache: KVCache, max_num_seqs: int, max_model_len: int) -> None:
        super().__init__(model, cache, max_num_seqs, max_model_len)
        self.steps = self._graphs = StepsAgain(self)  # type: ignore[assignment]

    def _fetch(self, sequences: list[Sequence], tokens: torch.Tensor) -> Launched:
        return Launched(sequences, tokens.clone(), Past())  # type: ignore[arg-type]


def requests(count: int) -> list[Request]:
    """Greedy and drawn, with and without penalties, some that stop, some that need the host."""
    source = random.Random(3)
    made = []
    for at in range(count):
        options = {"temperature": source.choice([0.0, 0.9]), "seed": at, "max_tokens": source.randint(1, 20)}
        options |= source.choice(
            [{}, {"repetition_penalty": 1.4}, {"frequency_penalty": 0.7, "presence_penalty": 0.3}, {"top_k": 5}]
        )
        if at % 5 == 4:
            options |= source.choice([{"logprobs": 1}, {"min_tokens": 3}, {"logit_bias": {7: 4.0}}])
        prompt = tuple(source.randrange(5, 320) for _ in range(source.choice([3, 14, 15, 31])))
        eos = tuple(range(5, 40)) if at % 2 else ()
        sampling = SamplingParams(**options)  # type: ignore[arg-type]
        made.append(Request(request_id=str(at), prompt_token_ids=prompt, sampling=sampling, eos_token_ids=eos))
    return made


def run(engine: Engine, wanted: list[Request]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {request.request_id: [] for request in wanted}
    for request in wanted:
        engine.add(request)
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            found[output.request_id] += output.token_ids
    return found


class PoorGuesses:
    """Drafts that are rejected, now and then: steps with drafts and without take turns, at any place of a block."""

    def __init__(self) -> None:
        self.source = random.Random(5)

    def propose(self, token_ids: ListLike[int], max_tokens: int) -> list[int]:
        return [token_ids[0]] * max_tokens if self.source.random() < 0.5 else []


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[[str], Path]) -> Decoder:
    return load_model(open_checkpoint(tiny_model_dir("llama")), "cpu", torch.float32)


def host_engine(model: Decoder, config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> Engine:
    def make(model: Decoder, num_blocks: int, config: EngineConfig, length: int) -> HostRunner:
        cache = model.new_cache(num_blocks, config.cache.block_size)
        return HostRunner(model, cache, config.scheduler.max_num_seqs, length)

    monkeypatch.setattr(core, "_runner", make)
    return Engine(model, config, "tiny")


@pytest.mark.parametrize("options", [{"num_blocks": 100}, {"num_blocks": 6, "max_num_seqs": 4}])
def test_the_tokens_are_those_of_the_plain_runner(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    config = EngineConfig.from_options(device="cpu", max_num_batched_tokens=48, **options)
    wanted = requests(8)
    expected = run(Engine(model, config, "tiny"), wanted)
    engine = host_engine(model, config, monkeypatch)
    found = run(engine, wanted)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert isinstance(engine.runner, HostRunner)
    assert engine.runner.steps.num_replays > 5
    if options["num_blocks"] == 6:
        assert engine.stats().num_preemptions > 0


def test_blocks_of_rejected_drafts_do_not_take_the_places_of_others(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rejected draft leaves its block to the tokens to come; a step before them must not be given that block."""
    config = EngineConfig.from_options(device="cpu", num_blocks=100, num_speculative_tokens=4)
    sampling = SamplingParams(temperature=0.0, max_tokens=100)
    wanted = [Request(request_id="0", prompt_token_ids=tuple(range(5, 25)), sampling=sampling)]
    expected = run(Engine(model, EngineConfig.from_options(device="cpu", num_blocks=100), "tiny"), wanted)
    engine = host_engine(model, config, monkeypatch)
    engine.scheduler.proposer = PoorGuesses()
    assert run(engine, wanted) == expected
    assert engine.stats().draft_tokens > engine.stats().accepted_draft_tokens
    assert isinstance(engine.runner, HostRunner)
    assert engine.runner.steps.num_replays > 5
