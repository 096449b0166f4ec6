"""The Python face: prompts in, texts out, over one engine in this process. Names and outputs are those of vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.config import EngineConfig
from powertrain.outputs import Answer, CompletionOutput, Logprob, RequestOutput
from powertrain.tokenizer import TextDelta, Tokenizer
from powertrain.types import InvalidRequest, ModelFileError, PowertrainError, Request, SamplingParams, TokenOutput

if TYPE_CHECKING:
    from powertrain.engine.core import Engine

logger = logging.getLogger(__name__)

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "Logprob", "RequestOutput"]

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or vLLM's dictionaries: `{"prompt": text}` or `{"prompt_token_ids": ids}`."""

Conversation = Sequence[Mapping[str, Any]]

GENERATION_CONFIG_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class _Model:
    """A ready engine and the text side that belongs to it."""

    engine: Engine
    tokenizer: Tokenizer
    default_sampling: SamplingParams

    @classmethod
    def load(cls, name: str, config: EngineConfig | None, options: Mapping[str, Any]) -> _Model:
        from powertrain.engine.core import Engine  # torch: a second, and only those who load a model need it

        if config is not None and options:
            raise PowertrainError(f"give either config or engine options, not both: {', '.join(options)}")
        config = config or EngineConfig.from_options(**options)
        path = resolve_model(name)
        tokenizer = load_tokenizer(path)
        # A GGUF file holds no sampling defaults, and reading its header again takes a tenth of a second.
        generation = {} if path.is_file() else open_checkpoint(path).generation_config
        defaults = {key: generation[key] for key in GENERATION_CONFIG_KEYS if generation.get(key) is not None}
        try:
            sampling = SamplingParams(**defaults)
        except InvalidRequest as error:
            raise ModelFileError(f"{path}: generation config: {error}") from error
        return cls(Engine.from_checkpoint(path, config), tokenizer, sampling)

    def answer(self, prompt: Prompt, sampling: SamplingParams | None, request_id: str) -> Answer:
        """A prompt made ready for the engine. Raises `InvalidRequest` for one of an unknown kind."""
        given: Any = prompt
        if isinstance(prompt, Mapping):
            given = prompt.get("prompt", prompt.get("prompt_token_ids"))
        text = given if isinstance(given, str) else None
        if text is not None:
            ids = self.tokenizer.encode(text)
        elif isinstance(given, Sequence) and all(type(token_id) is int for token_id in given):
            ids = list(given)
        else:
            raise InvalidRequest("a prompt must be text, token ids, or a dictionary with one of these", "prompt")
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(ids),
            sampling=sampling or self.default_sampling,
            eos_token_ids=self.tokenizer.eos_token_ids,
        )
        return Answer(self.tokenizer, request, text)


class LLM:
    """A model to call from one thread: `LLM("smollm2").generate(["Once upon a time"], SamplingParams(max_tokens=50))`.

    `model` is `smollm2`, a Hugging Face id, a folder or a `.gguf` file; engine settings come as an `EngineConfig` or
    as its flat options (`max_num_seqs=8`). Without sampling parameters, those of the model's `generation_config` hold.
    Use it as a context manager, or `close` it.
    """

    def __init__(self, model: str, config: EngineConfig | None = None, **options: Any) -> None:
        self._start(_Model.load(str(model), config, options))

    @classmethod
    def from_engine(cls, engine: Engine, tokenizer: Tokenizer, default_sampling: SamplingParams | None = None) -> Self:
        """The same over an engine that is already there; `close` closes it."""
        llm = cls.__new__(cls)
        llm._start(_Model(engine, tokenizer, default_sampling or SamplingParams()))
        return llm

    def _start(self, model: _Model) -> None:
        self._model = model
        self._live: dict[str, Answer] = {}
        self._ids = map(str, itertools.count())

    @property
    def engine(self) -> Engine:
        return self._model.engine

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds when no sampling parameters are given."""
        return self._model.default_sampling

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Continue each prompt; outputs come in the order of the prompts.

        `sampling_params` is one for all prompts or one for each. `use_tqdm` shows progress on a terminal. Raises
        `InvalidRequest` if one of the prompts can never run, and then none is.
        """
        listed = _as_list(prompts)
        if isinstance(sampling_params, SamplingParams) or sampling_params is None:
            params: Sequence[SamplingParams | None] = [sampling_params] * len(listed)
        else:
            params = sampling_params
        if len(params) != len(listed):
            raise InvalidRequest(f"{len(params)} sampling_params for {len(listed)} prompts", "sampling_params")
        answers = [self._model.answer(*pair, next(self._ids)) for pair in zip(listed, params, strict=True)]
        left = {answer.request.request_id for answer in answers}
        with self._running(answers), _progress(len(answers), is_shown=use_tqdm) as show:
            while left:
                for answer in self._step():
                    left.discard(answer.request.request_id)
                show(len(answers) - len(left))
        return [answer.output for answer in answers]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, by the model's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            self.tokenizer.apply_chat_template(conversation, add_generation_prompt, continue_final_message)  # type: ignore[arg-type]
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[TextDelta]:
        """Continue one prompt, a piece of text at a time. Closing the iterator early aborts the request."""
        answer = self._model.answer(prompt, sampling_params, next(self._ids))
        if answer.request.sampling.n != 1:
            raise InvalidRequest("n must be 1 to stream", "n")
        return self._stream(answer)

    def stream_chat(self, messages: Conversation, sampling_params: SamplingParams | None = None) -> Iterator[TextDelta]:
        """Answer one conversation, a piece of text at a time."""
        return self.stream(self.tokenizer.apply_chat_template(messages), sampling_params)

    def _stream(self, answer: Answer) -> Iterator[TextDelta]:
        deltas: deque[TextDelta] = deque()
        answer.deltas = deltas
        with self._running([answer]):
            while deltas or not answer.output.finished:
                if not deltas:
                    self._step()
                while deltas:
                    yield deltas.popleft()
                answer.check()

    @contextmanager
    def _running(self, answers: Iterable[Answer]) -> Iterator[None]:
        """Has the engine run these requests, all or none; those not finished at the end are aborted."""
        added: list[Answer] = []
        try:
            for answer in answers:
                self.engine.add(answer.request)
                added.append(answer)
                self._live[answer.request.request_id] = answer
            yield
        finally:
            for answer in added:
                del self._live[answer.request.request_id]
                if not answer.output.finished:
                    self.engine.abort(answer.request.request_id)

    def _step(self) -> list[Answer]:
        """One engine step; returns what it finished. A half-read stream gets its outputs too, and its own faults."""
        if not self.engine.has_work():
            raise PowertrainError("the engine has nothing to do but requests are unfinished; was it closed?")
        finished = []
        for output in self.engine.step():
            answer = self._live.get(output.request_id)
            if answer is None:
                continue
            if answer.push(output).should_abort:
                self.engine.abort(output.request_id, output.index)
            if answer.deltas is None:
                answer.check()
            if answer.output.finished:
                finished.append(answer)
        return finished

    def close(self) -> None:
        """End what is running and free the engine."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _as_list(prompts: Any) -> list[Any]:
    """The prompts as a list; one of an unknown kind is refused later, like any other in a list."""
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence):
        return [prompts]
    is_token_ids = len(prompts) > 0 and isinstance(prompts[0], int)
    return [prompts] if is_token_ids else list(prompts)


@contextmanager
def _progress(total: int, *, is_shown: bool) -> Iterator[Callable[[int], None]]:
    if not is_shown:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("prompts", total=total)
        yield lambda done: bars.update(task, completed=done)


@dataclass(slots=True)
class _Inbox:
    """Where the engine thread puts what belongs to one request of an event loop."""

    request: Request
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[TokenOutput | Exception] = field(default_factory=asyncio.Queue)

    def put(self, item: TokenOutput | Exception) -> None:
        # A loop that was closed with requests open has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


class _EngineThread:
    """Owns the engine in a thread of its own; other threads send it commands. When it ends, every inbox is told."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[str, _Inbox] = {}  # the engine thread's own: what its outputs belong to
        self._inboxes: dict[str, _Inbox] = {}
        self._lock = threading.Lock()  # guards _inboxes and _ended, so that no request slips in after the end
        self._ended: str | None = None
        self._thread = threading.Thread(target=self._run, name="powertrain-engine", daemon=True)
        self._thread.start()

    def add(self, inbox: _Inbox) -> None:
        request_id = inbox.request.request_id
        with self._lock:
            if self._ended is not None:
                raise PowertrainError(self._ended)
            if request_id in self._inboxes:
                raise InvalidRequest(f"request_id {request_id!r} is already running", "request_id")
            self._inboxes[request_id] = inbox
            self._commands.put(functools.partial(self._add, inbox))

    def _add(self, inbox: _Inbox) -> None:
        try:
            self._engine.add(inbox.request)
            self._live[inbox.request.request_id] = inbox
        except PowertrainError as error:
            inbox.put(error)

    def _abort(self, request_id: str, index: int | None) -> None:
        self._engine.abort(request_id, index)
        if index is None:
            self._live.pop(request_id, None)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its sequences; without `index` its inbox is closed and its id free again."""
        with self._lock:
            if index is None:
                self._inboxes.pop(request_id, None)
            self._commands.put(functools.partial(self._abort, request_id, index))

    def close(self) -> None:
        """End the thread after the step it is in; those who wait get an error."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            while self._take_commands():
                for output in self._engine.step():
                    inbox = self._live.get(output.request_id)
                    if inbox is not None:
                        inbox.put(output)
        except Exception as error:
            logger.exception("the engine thread failed")
            reason = f"the engine failed: {type(error).__name__}: {error}"
        finally:
            with self._lock:
                self._ended = reason
                inboxes = list(self._inboxes.values())
            for inbox in inboxes:
                inbox.put(PowertrainError(reason))
            self._engine.close()

    def _take_commands(self) -> bool:
        """Run what was asked meanwhile, or wait for it when the engine is idle; False to end."""
        while not (self._commands.empty() and self._engine.has_work()):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True


class AsyncLLM:
    """A model for asyncio: `async for output in llm.generate("Once", SamplingParams()): ...`.

    Takes what `LLM` takes. The engine runs in a thread of its own, and requests run together in its batches. Use it as
    an async context manager, or `aclose` it.
    """

    def __init__(self, model: str, config: EngineConfig | None = None, **options: Any) -> None:
        self._start(_Model.load(str(model), config, options))

    @classmethod
    def from_engine(cls, engine: Engine, tokenizer: Tokenizer, default_sampling: SamplingParams | None = None) -> Self:
        """The same over an engine that is already there; `aclose` closes it."""
        llm = cls.__new__(cls)
        llm._start(_Model(engine, tokenizer, default_sampling or SamplingParams()))
        return llm

    def _start(self, model: _Model) -> None:
        self._model = model
        self._thread = _EngineThread(model.engine)
        self._ids = map("async-{}".format, itertools.count())

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Continue one prompt; each output holds all there is so far, the last is `finished`.

        A slow reader gets fewer, larger steps. Leaving the loop early or cancelling aborts the request. Raises
        `InvalidRequest` for a prompt that can never run and `PowertrainError` if the engine fails or is closed.
        """
        # Tokenizing a long prompt takes a while, in native code that lets other threads run.
        request_id = request_id or next(self._ids)
        answer = await asyncio.to_thread(self._model.answer, prompt, sampling_params, request_id)
        inbox = _Inbox(answer.request, asyncio.get_running_loop())
        self._thread.add(inbox)
        try:
            while not answer.output.finished:
                self._take(answer, await inbox.items.get())
                while not inbox.items.empty():
                    self._take(answer, inbox.items.get_nowait())
                yield answer.snapshot()
        finally:
            self._thread.abort(request_id)

    def _take(self, answer: Answer, item: TokenOutput | Exception) -> None:
        if isinstance(item, Exception):
            raise item
        if answer.push(item).should_abort:
            self._thread.abort(item.request_id, item.index)
        answer.check()

    def chat(
        self, messages: Conversation, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Answer one conversation by the model's chat template; otherwise as `generate`."""
        return self.generate(self.tokenizer.apply_chat_template(messages), sampling_params, request_id)

    async def aclose(self) -> None:
        """End what is running, telling those who wait, and free the engine."""
        await asyncio.to_thread(self._thread.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()
