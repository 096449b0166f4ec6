"""Between HTTP and the bridge: admission, requests into the engine, tokens into text, and the times of it all."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from powertrain.serve.bridge import EngineClient, EngineFaultError, OutputQueue
from powertrain.serve.errors import unavailable
from powertrain.serve.messages import Outputs
from powertrain.serve.metrics import Metrics, SequenceTimes
from powertrain.tokenizer import TextDelta, TextStream, Tokenizer
from powertrain.types import FinishReason, InvalidRequest, Request, SamplingParams, TokenLogprob, TokenOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one HTTP request asks of the engine: some prompts, `sampling.n` sequences of each.

    `sampling` holds one entry per prompt, as the token budget left depends on the prompt's length.
    """

    prompts: tuple[tuple[int, ...], ...]
    sampling: tuple[SamplingParams, ...]
    cache_salt: str = ""

    @property
    def n(self) -> int:
        return self.sampling[0].n


@dataclass(slots=True, kw_only=True)
class Delta:
    """News of one sequence. `choice` numbers the sequences of the whole job, prompt by prompt."""

    prompt_index: int
    choice: int
    text: TextDelta
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(slots=True)
class _Sequence:
    prompt_index: int
    choice: int
    stream: TextStream
    times: SequenceTimes


class Slots:
    """Places in the engine and its queue, given out at once or not at all."""

    def __init__(self, max_sequences: int) -> None:
        self.max_sequences = max_sequences
        self.num_taken = 0

    def take(self, num_sequences: int) -> Slot | None:
        if self.num_taken + num_sequences > self.max_sequences:
            return None
        self.num_taken += num_sequences
        return Slot(self, num_sequences)


@dataclass(slots=True)
class Slot:
    """`is_owned` once a generation has it, which then gives it back."""

    slots: Slots
    num_sequences: int
    is_owned: bool = False

    def release(self) -> None:
        """Give the places back; more than once is no error."""
        self.slots.num_taken -= self.num_sequences
        self.num_sequences = 0

    def release_unless_owned(self) -> None:
        """For whoever took the slot and may have failed before it was handed on."""
        if not self.is_owned:
            self.release()


class TextService:
    """One engine and its tokenizer, for the HTTP layer. `is_draining` True admits nothing more."""

    def __init__(self, engine: EngineClient, tokenizer: Tokenizer, metrics: Metrics, max_queued_requests: int) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.is_draining = False
        self._slots = Slots(engine.info.max_num_seqs + max_queued_requests)
        engine.on_step = self._on_step
        metrics.engine.num_dropped_messages = lambda: engine.num_dropped_messages
        self.step_started_at = 0.0

    @property
    def num_active(self) -> int:
        """Sequences admitted and not yet answered."""
        return self._slots.num_taken

    def admit(self, num_prompts: int, n: int) -> Slot:
        """Places for a job, before anything is spent on it. Raises 503 when full, draining or without an engine."""
        num_sequences = num_prompts * n
        if num_sequences > self._slots.max_sequences:
            raise InvalidRequest(
                f"{num_prompts} prompts with n={n} are {num_sequences} sequences; "
                f"this server takes {self._slots.max_sequences} at once",
                "n" if n > num_prompts else "prompt",
            )
        if self.is_draining:
            self.metrics.observe_rejection("draining")
            raise unavailable("the server is shutting down", "draining")
        if self.engine.error is not None:
            raise unavailable(f"the engine is gone: {self.engine.error}", "engine_dead")
        slot = self._slots.take(num_sequences)
        if slot is None:
            self.metrics.observe_rejection("queue_full")
            raise unavailable("the server's queue is full; try again later", "queue_full")
        return slot

    def start(self, job: Job, slot: Slot) -> Generation:
        """Put the job into the engine. The generation owns `slot` from here on: close it."""
        return Generation(self, job, slot)

    def _on_step(self, message: Outputs) -> None:
        self.step_started_at = message.started_at
        self.metrics.on_step(message)


class Generation:
    """The sequences of one job while they run. `next` until it gives None; `close` in any case, at any time."""

    def __init__(self, service: TextService, job: Job, slot: Slot) -> None:
        self._service = service
        self._slot = slot
        slot.is_owned = True
        self._queue = OutputQueue()
        self._open: dict[tuple[str, int], _Sequence] = {}
        self._request_ids: list[str] = []
        arrival = time.monotonic()
        try:
            for prompt_index, (prompt, sampling) in enumerate(zip(job.prompts, job.sampling, strict=True)):
                self._add(prompt_index, prompt, sampling, job.cache_salt, arrival)
        except BaseException:
            self.close()
            raise

    def _add(
        self, prompt_index: int, prompt: tuple[int, ...], sampling: SamplingParams, cache_salt: str, arrival: float
    ) -> None:
        service = self._service
        request = Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=prompt,
            sampling=sampling,
            eos_token_ids=service.tokenizer.eos_token_ids,
            cache_salt=cache_salt,
        )
        service.engine.add(request, self._queue)
        service.metrics.observe_request(len(prompt), sampling.n, sampling.max_tokens or 0)
        self._request_ids.append(request.request_id)
        for index in range(sampling.n):
            self._open[request.request_id, index] = _Sequence(
                prompt_index,
                prompt_index * sampling.n + index,
                TextStream(service.tokenizer, sampling),
                SequenceTimes(arrival),
            )

    async def next(self) -> Delta | None:
        """The next news of any sequence; None when all have ended. Raises what the engine or the job failed with."""
        while self._open:
            output = await self._queue.get()
            key = (output.request_id, output.index)
            if (sequence := self._open.get(key)) is not None:
                return self._take(key, sequence, output)
        return None

    def _take(self, key: tuple[str, int], sequence: _Sequence, output: TokenOutput) -> Delta:
        service = self._service
        if output.finish_reason is FinishReason.ERROR:
            raise EngineFaultError(output.error or "the engine failed at this request")
        if output.token_ids:
            service.metrics.observe_output(sequence.times, service.step_started_at, time.monotonic())
        text = sequence.stream.push(output)
        if text.finish_reason is not None:
            if text.should_abort:
                service.engine.abort(*key)
            del self._open[key]
            service.metrics.observe_finish(sequence.times, sequence.stream.num_tokens, text.finish_reason.value)
        return Delta(
            prompt_index=sequence.prompt_index,
            choice=sequence.choice,
            text=text,
            num_cached_tokens=output.num_cached_tokens,
            prompt_logprobs=output.prompt_logprobs,
        )

    def close(self) -> None:
        """Abort what still runs and give the places back; more than once is no error."""
        for request_id in self._request_ids:
            self._service.engine.abort(request_id)
        for sequence in self._open.values():
            reason = "error" if self._service.engine.error else "abort"
            self._service.metrics.observe_finish(sequence.times, sequence.stream.num_tokens, reason)
        self._request_ids.clear()
        self._open.clear()
        self._slot.release()
