"""The engine planning one step ahead of its tokens, as on a GPU, but on a CPU: the same tokens as step by step.

The runner here computes at once and keeps to itself what a device would: the last token of each slot.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import EngineConfig
from powertrain.engine import core
from powertrain.engine.core import Engine
from powertrain.engine.gpu_runner import GpuRunner
from powertrain.engine.runner import Runner, StepResult
from powertrain.engine.sampler import Row, sample
from powertrain.types import FinishReason, Request, SamplingParams


@dataclass
class Late:
    result: StepResult

    def collect(self) -> StepResult:
        return self.result


class LateRunner(GpuRunner):
    def __init__(self, model, cache, max_num_seqs, max_model_len):
        Runner.__init__(self, model, cache, max_num_seqs, max_model_len)
        self.last: dict[int, int] = {}
        self.num_launches = 0

    def execute(self, plan):
        result = Runner.execute(self, plan)
        self.last.update({seq.slot: tokens[-1] for seq, tokens in result.token_ids.items() if tokens})
        return result

    def launch(self, plan):
        self.num_launches += 1
        chunks = sorted(plan.chunks, key=lambda chunk: chunk.count != 1)
        token_ids, step = self._inputs(chunks)
        result, end, sampling = StepResult(), 0, []
        for chunk in chunks:
            end += chunk.count
            seq = chunk.sequence
            pending = [self.last[seq.slot]] if seq.num_pending else []
            if pending:
                token_ids[end - 1] = pending[0]
            if chunk.samples and len(seq.token_ids) < seq.max_length:
                row = Row(seq.request.sampling, [*seq.token_ids, *pending], seq.num_prompt, (), seq.seed, seq.index)
                sampling.append((seq, end - 1, row))
        hidden = self.model.forward(token_ids, step, self.cache)
        if sampling:
            logits = self.model.logits(hidden[[at for _, at, _ in sampling]])
            for (seq, _, _), token in zip(sampling, sample(logits, [row for *_, row in sampling]), strict=True):
                assert token is not None
                self.last[seq.slot] = token
                result.token_ids[seq] = [token]
        return Late(result)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(open_checkpoint(tiny_model_dir("llama")), "cpu", torch.float32)


def engine_of(model, monkeypatch, *, is_late, **options):
    if is_late:

        def make(model, num_blocks, config, length):
            cache = model.new_cache(num_blocks, config.cache.block_size)
            return LateRunner(model, cache, config.scheduler.max_num_seqs, length)

        monkeypatch.setattr(core, "_runner", make)
    else:
        monkeypatch.undo()
    return Engine(model, EngineConfig.from_options(device="cpu", **options), "tiny")


def requests(count):
    """Prompts of many lengths, some random, some that stop, some that need the host."""
    rng = random.Random(7)
    made = []
    for at in range(count):
        sampling = {"temperature": rng.choice([0.0, 0.8]), "seed": at, "max_tokens": rng.randint(0, 30)}
        if at % 13 == 12:
            sampling |= rng.choice([{"repetition_penalty": 1.3}, {"logprobs": 2}, {"min_tokens": 4}])
        prompt = tuple(rng.randrange(5, 320) for _ in range(rng.randint(1, 50)))
        eos = tuple(range(5, 60)) if at % 2 else ()
        one = Request(
            request_id=str(at), prompt_token_ids=prompt, sampling=SamplingParams(**sampling), eos_token_ids=eos
        )
        made.append(one)
    return made


def run(engine, wanted, late_arrivals=0):
    done = {one.request_id: ([], None) for one in wanted}
    early, late = wanted[: len(wanted) - late_arrivals], wanted[len(wanted) - late_arrivals :]
    for one in early:
        engine.add(one)
    steps = 0
    while engine.has_work() or late:
        if late and steps % 3 == 0:
            engine.add(late.pop())
        for output in engine.step():
            tokens, reason = done[output.request_id]
            assert reason is None, "a token after the end"
            done[output.request_id] = ([*tokens, *output.token_ids], output.finish_reason)
        steps += 1
        engine.scheduler.check()
    assert engine.stats().num_blocks_in_use == 0
    return done


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 200},
        {"num_blocks": 9, "max_num_seqs": 6, "max_num_batched_tokens": 24},
        {"num_blocks": 200, "enable_prefix_caching": False, "max_num_seqs": 3},
        {"num_blocks": 200, "num_speculative_tokens": 3, "prompt_lookup_min": 1, "max_num_batched_tokens": 64},
    ],
)
def test_the_tokens_are_those_of_step_by_step(model, monkeypatch, options):
    wanted = requests(40)
    ahead = engine_of(model, monkeypatch, is_late=True, **options)
    found = run(ahead, wanted, late_arrivals=15)
    assert ahead.runner.num_launches > 20
    plain = engine_of(model, monkeypatch, is_late=False, **options)
    expected = run(plain, wanted, late_arrivals=15)
    different = [name for name in expected if found[name] != expected[name]]
    # sums of another batch may part two equal logits
    assert len(different) <= 1
    if options["num_blocks"] == 9:
        assert ahead.stats().num_preemptions > 0
    assert (ahead.stats().accepted_draft_tokens > 0) == ("num_speculative_tokens" in options)


def test_an_abort_and_a_close_while_a_step_is_under_way(model, monkeypatch):
    engine = engine_of(model, monkeypatch, is_late=True, num_blocks=50)
    for one in requests(6)[1:4]:
        engine.add(one)
    assert engine.step() == []  # under way
    engine.abort("1")
    outputs = engine.step()
    assert {output.request_id for output in outputs} <= {"2", "3"}
    engine.close()
    assert not engine.has_work()
    assert engine.pool.num_in_use == 0


def test_a_step_that_cannot_be_launched_ends_its_requests_only(model, monkeypatch):
    engine = engine_of(model, monkeypatch, is_late=True, num_blocks=50)
    one, other = requests(6)[1:3]
    engine.add(one)
    engine.step()
    launch = engine.runner.launch

    def broken(plan):
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.runner, "launch", broken)
    outputs = engine.step()
    assert outputs[0].finish_reason is FinishReason.ERROR
    monkeypatch.setattr(engine.runner, "launch", launch)
    assert len(run(engine, [other])[other.request_id][0]) == other.sampling.max_tokens
