"""What a request gives back: vLLM's output types, and the answer that engine outputs fill piece by piece."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from powertrain.tokenizer import TextDelta, TextStream, Tokenizer
from powertrain.types import FinishReason, PowertrainError, Request, TokenLogprob, TokenOutput


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's natural log-probability and its rank (1 is the likeliest) at one position."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One of a request's `n` texts. `logprobs` has, per token, the chosen and the likeliest ones by token id."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A request's prompt and texts, so far or in full (`finished`). `prompt` is None for a prompt of token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0


@dataclass(slots=True)
class Answer:
    """What has come for one request: a text stream and an output for each of its `n` sequences."""

    tokenizer: Tokenizer
    request: Request
    prompt: str | None
    streams: list[TextStream] = field(init=False)
    output: RequestOutput = field(init=False)
    deltas: deque[TextDelta] | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.streams = [TextStream(self.tokenizer, sampling) for _ in range(sampling.n)]
        wants_logprobs = sampling.logprobs is not None
        self.output = RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            prompt_logprobs=None,
            outputs=[
                CompletionOutput(
                    index=index,
                    text="",
                    token_ids=[],
                    cumulative_logprob=0.0 if wants_logprobs else None,
                    logprobs=[] if wants_logprobs else None,
                )
                for index in range(sampling.n)
            ],
            finished=False,
        )

    def push(self, engine_output: TokenOutput) -> TextDelta:
        """Add one engine output; a fault in the engine is kept for `check`."""
        stream, output = self.streams[engine_output.index], self.output.outputs[engine_output.index]
        delta = stream.push(engine_output)
        if self.deltas is not None:
            self.deltas.append(delta)
        if delta.finish_reason is FinishReason.ERROR:
            self.error = delta.error or "unknown fault"
        output.token_ids += delta.token_ids
        if delta.logprobs is not None and output.logprobs is not None:
            output.logprobs += [self._by_token(entry) for entry in delta.logprobs]
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(e.logprob for e in delta.logprobs)
        if delta.finish_reason is not None:
            output.text = stream.text
            output.finish_reason, output.stop_reason = delta.finish_reason, delta.stop_reason
        if engine_output.prompt_logprobs is not None and self.output.prompt_logprobs is None:
            entries = engine_output.prompt_logprobs
            self.output.prompt_logprobs = [None if entry is None else self._by_token(entry) for entry in entries]
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, engine_output.num_cached_tokens)
        self.output.finished = all(stream.finish_reason is not None for stream in self.streams)
        return delta

    def check(self) -> None:
        """Raises `PowertrainError` if the engine failed on one of the sequences."""
        if self.error is not None:
            raise PowertrainError(f"request {self.request.request_id} failed in the engine: {self.error}")

    def _by_token(self, entry: TokenLogprob) -> dict[int, Logprob]:
        text = self.tokenizer.token_text
        chosen = {entry.token_id: Logprob(entry.logprob, entry.rank, text(entry.token_id))}
        tops = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
        return chosen | {token: Logprob(value, rank, text(token)) for rank, (token, value) in enumerate(tops, start=1)}

    def snapshot(self) -> RequestOutput:
        """The output as of now, which later pushes leave alone."""
        now = self.output
        outputs = [
            CompletionOutput(
                index=one.index,
                text=self.streams[one.index].text,
                token_ids=list(one.token_ids),
                cumulative_logprob=one.cumulative_logprob,
                logprobs=None if one.logprobs is None else list(one.logprobs),
                finish_reason=one.finish_reason,
                stop_reason=one.stop_reason,
            )
            for one in now.outputs
        ]
        return RequestOutput(
            request_id=now.request_id,
            prompt=now.prompt,
            prompt_token_ids=now.prompt_token_ids,
            prompt_logprobs=now.prompt_logprobs,
            outputs=outputs,
            finished=now.finished,
            num_cached_tokens=now.num_cached_tokens,
        )
