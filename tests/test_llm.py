"""LLM and AsyncLLM over a small scripted engine, where every order of events can be had, and over a real one."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from powertrain.engine.core import Engine
from powertrain.llm import LLM, AsyncLLM, RequestOutput
from powertrain.tokenizer import Tokenizer
from powertrain.types import (
    FinishReason,
    InvalidRequest,
    ModelFileError,
    PowertrainError,
    Request,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)

SCRIPT = "one two three four five six seven"


def char_tokenizer() -> Tokenizer:
    """One token per byte, then `</s>`."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"}, chat_template=template)


@dataclass
class ScriptedEngine:
    """The engine's face: each sequence says `script`, two tokens a step, the first index slower by a step."""

    tokenizer: Tokenizer
    script: str = SCRIPT
    fault: str = ""  # "sequence": an ERROR output at the second step; "engine": step raises
    live: dict[tuple[str, int], tuple[Request, int]] = field(default_factory=dict)
    aborted: list[tuple[str, int | None]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    num_steps: int = 0
    is_closed: bool = False
    gate: threading.Event | None = None

    def add(self, request: Request) -> None:
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt is empty", "prompt")
        for index in range(request.sampling.n):
            self.live[request.request_id, index] = (request, 0)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))
        for key in list(self.live):
            if key[0] == request_id and index in (None, key[1]):
                del self.live[key]

    def has_work(self) -> bool:
        return bool(self.live)

    def step(self) -> list[TokenOutput]:
        if self.gate is not None:
            assert self.gate.wait(20)
        self.threads.add(threading.get_ident())
        self.num_steps += 1
        if self.fault == "engine":
            raise RuntimeError("boom")
        return [
            self._advance(key) for key in list(self.live) if self.num_steps > 1 or key[1] > 0 or len(self.live) == 1
        ]

    def _advance(self, key: tuple[str, int]) -> TokenOutput:
        request, position = self.live[key]
        sampling = request.sampling
        limit = sampling.max_tokens or 10**6
        script = [*self.tokenizer.encode(self.script), self.tokenizer.eos_token_ids[0]]
        ids = script[position : min(position + 2, limit)]
        position += len(ids)
        finish, stop_token_id = None, None
        if ids[-1] in request.eos_token_ids:
            finish, stop_token_id = FinishReason.STOP, ids[-1]
        elif position >= limit:
            finish = FinishReason.LENGTH
        if self.fault == "sequence" and self.num_steps > 1:
            finish, ids = FinishReason.ERROR, []
        self.live[key] = (request, position)
        if finish is not None:
            del self.live[key]
        logprobs = [TokenLogprob(i, -0.5, 1, (i, 0), (-0.5, -3.0)) for i in ids] if sampling.logprobs else None
        prompt_logprobs: list[TokenLogprob | None] | None = None
        if sampling.prompt_logprobs is not None and position == len(ids):
            prompt_logprobs = [None, *(TokenLogprob(i, -1.0, 7) for i in request.prompt_token_ids[1:])]
        return TokenOutput(
            request_id=key[0],
            index=key[1],
            token_ids=ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=finish,
            stop_token_id=stop_token_id,
            num_cached_tokens=3,
            error="not a number" if finish is FinishReason.ERROR else None,
        )

    def close(self) -> None:
        self.is_closed = True
        self.live.clear()


@pytest.fixture
def scripted() -> ScriptedEngine:
    return ScriptedEngine(char_tokenizer())


@pytest.fixture
def llm(scripted: ScriptedEngine) -> LLM:
    return LLM.from_engine(cast(Engine, scripted), scripted.tokenizer)


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count) for count in (9, 2, 5)]
    outputs = llm.generate(["a", [1, 2, 3], {"prompt_token_ids": [4]}], params)
    assert [one.outputs[0].text for one in outputs] == ["one two t", "on", "one t"]
    assert [one.prompt for one in outputs] == ["a", None, None]
    assert [one.prompt_token_ids for one in outputs] == [llm.tokenizer.encode("a"), [1, 2, 3], [4]]
    assert all(one.finished and one.num_cached_tokens == 3 for one in outputs)
    assert [one.outputs[0].finish_reason for one in outputs] == ["length"] * 3


def test_one_prompt_in_any_form_gives_one_output(llm: LLM) -> None:
    for prompt in ("a", [5, 6], {"prompt": "a"}):
        (output,) = llm.generate(prompt)
        assert len(output.outputs[0].token_ids) == 16
    assert llm.generate([]) == []


def test_eos_ends_without_a_reason_and_is_not_in_the_text(llm: LLM) -> None:
    (output,) = llm.generate("a", SamplingParams(max_tokens=None))
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (SCRIPT, "stop", None)
    assert completion.token_ids[-1] == llm.tokenizer.eos_token_ids[0]


def test_a_stop_string_aborts_its_sequence_only(llm: LLM, scripted: ScriptedEngine) -> None:
    (output,) = llm.generate("a", SamplingParams(max_tokens=20, n=2, stop=(" th",), logprobs=1))
    for completion in output.outputs:
        assert (completion.text, completion.finish_reason, completion.stop_reason) == ("one two", "stop", " th")
        assert llm.tokenizer.decode(completion.token_ids) == "one two th"
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.cumulative_logprob == pytest.approx(-0.5 * len(completion.token_ids))
    assert sorted(scripted.aborted) == [(output.request_id, 0), (output.request_id, 1)]
    assert not scripted.has_work()


def test_logprobs_are_by_token_with_rank_and_text(llm: LLM) -> None:
    (output,) = llm.generate("ab", SamplingParams(max_tokens=1, logprobs=2, prompt_logprobs=0))
    token = llm.tokenizer.encode("o")[0]
    assert output.outputs[0].logprobs is not None
    first = output.outputs[0].logprobs[0]
    assert list(first) == [token, 0]
    assert (first[token].decoded_token, first[token].rank, first[0].rank) == ("o", 1, 2)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1] is not None
    assert output.prompt_logprobs[1][llm.tokenizer.encode("b")[0]].rank == 7
    assert llm.generate("a", SamplingParams(max_tokens=1))[0].outputs[0].cumulative_logprob is None


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    hello = [{"role": "user", "content": "hello"}]
    (one,) = llm.chat(hello, SamplingParams(max_tokens=3))
    several = llm.chat([hello, hello], SamplingParams(max_tokens=3))
    assert [llm.tokenizer.decode(output.prompt_token_ids) for output in [one, *several]] == ["hello>"] * 3
    (open_ended,) = llm.chat(hello, add_generation_prompt=False, continue_final_message=True)
    assert llm.tokenizer.decode(open_ended.prompt_token_ids) == "hello"


@pytest.mark.parametrize("prompt", [3, None, ["a", 3], {"text": "a"}, [[1, "b"]], [[True]]])
def test_a_prompt_of_an_unknown_kind_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequest):
        llm.generate(prompt)


def test_a_bad_prompt_takes_the_others_back(llm: LLM, scripted: ScriptedEngine) -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate(["a", ""])
    assert not scripted.has_work()
    with pytest.raises(InvalidRequest, match="2 sampling_params for 1"):
        llm.generate(["a"], [SamplingParams()] * 2)
    assert llm.generate("a", SamplingParams(max_tokens=3))[0].outputs[0].text == "one"


def test_a_failed_sequence_raises_and_the_engine_goes_on(llm: LLM, scripted: ScriptedEngine) -> None:
    scripted.fault = "sequence"
    with pytest.raises(PowertrainError, match="not a number"):
        llm.generate(["a", "b"])
    assert not scripted.has_work()
    scripted.fault = ""
    assert llm.generate("a", SamplingParams(max_tokens=3))[0].outputs[0].text == "one"


def test_streamed_pieces_are_the_text(llm: LLM) -> None:
    pieces = list(llm.stream("a", SamplingParams(max_tokens=None, stop=("six",))))
    assert "".join(piece.text for piece in pieces) == "one two three four five "
    assert len(pieces) > 5
    assert pieces[-1].stop_reason == "six"
    chat = llm.stream_chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=3))
    assert "".join(piece.text for piece in chat) == "one"
    with pytest.raises(InvalidRequest, match="n must be 1"):
        llm.stream("a", SamplingParams(n=2))


def test_a_stream_left_half_read_loses_nothing_and_is_aborted_when_closed(llm: LLM, scripted: ScriptedEngine) -> None:
    stream = llm.stream("a", SamplingParams(max_tokens=12))
    start = next(stream).text
    assert llm.generate("b", SamplingParams(max_tokens=9))[0].outputs[0].text == "one two t"
    assert start + "".join(piece.text for piece in stream) == SCRIPT[:12]
    other = llm.stream("a", SamplingParams(max_tokens=None))
    next(other)
    other.close()
    assert not scripted.has_work()


def test_a_closed_engine_is_an_error_and_no_hang(llm: LLM, scripted: ScriptedEngine) -> None:
    with llm:
        stream = llm.stream("a")
        next(stream)
    assert scripted.is_closed
    with pytest.raises(PowertrainError, match="closed"):
        list(stream)


# AsyncLLM. Every wait is bounded.


@pytest.fixture
async def async_llm(scripted: ScriptedEngine) -> AsyncLLM:
    return AsyncLLM.from_engine(cast(Engine, scripted), scripted.tokenizer)


async def collect(llm: AsyncLLM, prompt: Any, sampling: SamplingParams, **more: Any) -> list[RequestOutput]:
    async with asyncio.timeout(20):
        return [output async for output in llm.generate(prompt, sampling, **more)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def test_async_outputs_grow_to_the_whole(async_llm: AsyncLLM, scripted: ScriptedEngine) -> None:
    async with async_llm:
        several = [collect(async_llm, "a", SamplingParams(max_tokens=count)) for count in (1, 7, 20)]
        results = await asyncio.gather(*several)
        for outputs, count in zip(results, (1, 7, 20), strict=True):
            texts = [output.outputs[0].text for output in outputs]
            assert texts[-1] == SCRIPT[:count]
            assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        assert scripted.threads.isdisjoint({threading.get_ident()})
    assert scripted.is_closed


async def test_async_stop_string_and_n(async_llm: AsyncLLM, scripted: ScriptedEngine) -> None:
    async with async_llm:
        last = (await collect(async_llm, "a", SamplingParams(max_tokens=None, n=3, stop=("four",))))[-1]
        assert [one.text for one in last.outputs] == ["one two three "] * 3
        assert [one.index for one in last.outputs] == [0, 1, 2]
        await until(lambda: (last.request_id, None) in scripted.aborted)
        assert {(last.request_id, index) for index in range(3)} <= set(scripted.aborted)


async def test_async_chat(async_llm: AsyncLLM) -> None:
    async with async_llm, asyncio.timeout(20):
        messages = [{"role": "user", "content": "hi"}]
        outputs = [output async for output in async_llm.chat(messages, SamplingParams(max_tokens=3))]
        assert outputs[-1].outputs[0].text == "one"
        assert async_llm.tokenizer.decode(outputs[-1].prompt_token_ids) == "hi>"


async def test_leaving_or_cancelling_aborts(async_llm: AsyncLLM, scripted: ScriptedEngine) -> None:
    scripted.script = "x" * 10**5
    async with async_llm:
        generator = async_llm.generate("a", SamplingParams(max_tokens=None), request_id="left")
        async with asyncio.timeout(20):
            await anext(aiter(generator))
            await generator.aclose()  # type: ignore[attr-defined]
        task = asyncio.create_task(collect(async_llm, "a", SamplingParams(max_tokens=None), request_id="cancelled"))
        await until(lambda: ("cancelled", 0) in scripted.live)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not scripted.has_work())
        assert {("left", None), ("cancelled", None)} <= set(scripted.aborted)
        scripted.script = SCRIPT
        assert (await collect(async_llm, "a", SamplingParams(max_tokens=3), request_id="left"))[-1].finished


async def test_async_refusals_reach_their_caller_only(async_llm: AsyncLLM, scripted: ScriptedEngine) -> None:
    async with async_llm:
        scripted.gate = threading.Event()
        running = asyncio.create_task(collect(async_llm, "a", SamplingParams(max_tokens=5), request_id="same"))
        await until(lambda: ("same", 0) in scripted.live)
        with pytest.raises(InvalidRequest, match="request_id"):
            await collect(async_llm, "a", SamplingParams(), request_id="same")
        scripted.gate.set()
        with pytest.raises(InvalidRequest, match="empty"):
            await collect(async_llm, "", SamplingParams())
        assert (await running)[-1].outputs[0].text == "one t"


@pytest.mark.parametrize("fault", ["engine", "sequence"])
async def test_an_engine_fault_reaches_every_waiter(scripted: ScriptedEngine, fault: str) -> None:
    scripted.fault = fault
    scripted.gate = threading.Event()
    async with AsyncLLM.from_engine(cast(Engine, scripted), scripted.tokenizer) as llm:
        tasks = [asyncio.create_task(collect(llm, "a", SamplingParams(max_tokens=99))) for _ in range(4)]
        await asyncio.sleep(0.05)
        scripted.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(type(result) is PowertrainError for result in results)
        if fault == "engine":
            with pytest.raises(PowertrainError, match="boom"):
                await collect(llm, "a", SamplingParams())


async def test_closing_tells_those_who_wait(async_llm: AsyncLLM, scripted: ScriptedEngine) -> None:
    scripted.script = "x" * 10**5
    tasks = [asyncio.create_task(collect(async_llm, "a", SamplingParams(max_tokens=None))) for _ in range(3)]
    await until(lambda: len(scripted.live) == 3)
    async with asyncio.timeout(20):
        await async_llm.aclose()
        await async_llm.aclose()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, PowertrainError) and "closed" in str(result) for result in results)
    with pytest.raises(PowertrainError, match="closed"):
        await collect(async_llm, "a", SamplingParams())


# The real engine on a tiny model.


@pytest.fixture(scope="module")
def real(tiny_model_dir: Callable[[str], Path]) -> LLM:
    return LLM(str(tiny_model_dir("llama")), num_blocks=64, max_num_seqs=4, threads=1)


def greedy(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **more)


def test_real_greedy_text_is_the_same_alone_streamed_and_together(real: LLM) -> None:
    prompts = ["Once upon a time", "The engine", "Numbers: 0 1 2", "When the rain came it said", "東京"]
    together = real.generate(prompts, greedy(12))
    for prompt, output in zip(prompts, together, strict=True):
        assert real.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True) == output.outputs[0].text
        assert len(output.outputs[0].token_ids) == 12
        assert "".join(piece.text for piece in real.stream(prompt, greedy(12))) == output.outputs[0].text
        assert real.generate(prompt, greedy(12))[0].outputs[0].token_ids == output.outputs[0].token_ids


def test_real_stop_string_frees_the_blocks(real: LLM) -> None:
    text = real.generate("Once upon a time", greedy(24))[0].outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    (output,) = real.generate("Once upon a time", greedy(24, stop=(stop,)))
    assert output.outputs[0].text == text[: text.index(stop)]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    assert not real.engine.has_work()
    assert real.engine.stats().num_blocks_in_use == 0


def test_real_logprobs_and_n(real: LLM) -> None:
    sampling = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=6, logprobs=2, prompt_logprobs=1)
    (output,) = real.generate("The engine", sampling)
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for one in output.outputs:
        assert one.logprobs is not None
        chosen = [entry[token].logprob for entry, token in zip(one.logprobs, one.token_ids, strict=True)]
        assert one.cumulative_logprob == pytest.approx(sum(chosen))


def test_real_refusals_name_the_field(real: LLM) -> None:
    for prompt, param in (([10**6], "prompt"), ([0] * 4000, "prompt")):
        with pytest.raises(InvalidRequest) as caught:
            real.generate(["fine", prompt], greedy(2))
        assert caught.value.param == param
    assert not real.engine.has_work()


async def test_real_async_is_the_offline_text(tiny_model_dir: Callable[[str], Path], real: LLM) -> None:
    prompts = ["Once upon a time", "The engine", "It pulled three carts"]
    expected = [output.outputs[0].text for output in real.generate(prompts, greedy(10))]
    async with AsyncLLM(str(tiny_model_dir("llama")), num_blocks=64, threads=1) as llm:
        results = await asyncio.gather(*(collect(llm, prompt, greedy(10)) for prompt in prompts))
        assert [outputs[-1].outputs[0].text for outputs in results] == expected


def test_generation_config_gives_the_defaults(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), folder)
    settings = {"eos_token_id": 1, "temperature": 0.25, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with LLM(str(folder), num_blocks=16, threads=1) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(
            temperature=0.25, top_p=0.5, top_k=3, repetition_penalty=1.5
        )
        assert len(llm.generate("Once")[0].outputs[0].token_ids) <= 16
    (folder / "generation_config.json").write_text('{"temperature": -1}')
    with pytest.raises(ModelFileError, match="generation config"):
        LLM(str(folder), num_blocks=16)


def test_engine_options_are_checked(tiny_model_dir: Callable[[str], Path]) -> None:
    from powertrain.config import EngineConfig

    with pytest.raises(PowertrainError, match="max_nmu_seqs"):
        LLM(str(tiny_model_dir("llama")), max_nmu_seqs=3)
    with pytest.raises(PowertrainError, match="not both"):
        LLM(str(tiny_model_dir("llama")), EngineConfig(), max_num_seqs=3)
    with pytest.raises(PowertrainError):
        LLM("no/such/model/here.gguf")


def test_progress_is_quiet_off_a_terminal(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompts: Sequence[str] = ["a", "b"]
    assert len(llm.generate(prompts, SamplingParams(max_tokens=3), use_tqdm=True)) == 2
    assert capsys.readouterr() == ("", "")
