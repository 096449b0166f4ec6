"""How an answer is written: collected into one body or streamed as server-sent events, and given up with its client."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from powertrain.serve.errors import api_error, json_response
from powertrain.serve.service import Delta, Generation
from powertrain.types import TokenLogprob

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""JSON has no infinity; this is what OpenAI writes for it."""

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Piece:
    """What one delta adds to one choice, ready to be written as a chunk or to be joined with the choice's others."""

    choice: int
    text: str
    token_ids: list[int]
    logprobs: dict[str, list[Any]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    is_first: bool = False

    def extend(self, later: Piece) -> None:
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            mine = self.logprobs = self.logprobs or {}
            for name, values in later.logprobs.items():
                mine.setdefault(name, []).extend(values)
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


class Format(Protocol):
    """One endpoint's shape of pieces, chunks and bodies."""

    object_name: str
    chunk_name: str

    def piece(self, delta: Delta) -> Piece: ...
    def chunk_choice(self, piece: Piece) -> dict[str, Any]: ...
    def choice(self, piece: Piece, prompt_logprobs: list[TokenLogprob | None] | None) -> dict[str, Any]: ...


@dataclass(slots=True, kw_only=True)
class Usage:
    """Token counts of one answer; each prompt counts once, however many sequences share it."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict)

    def add(self, delta: Delta, num_tokens: int) -> None:
        self.completion_tokens += num_tokens
        self.cached_tokens.setdefault(delta.prompt_index, delta.num_cached_tokens)

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    answer_id: str
    model: str
    num_choices: int
    stream_options: dict[str, bool | None]
    return_token_ids: bool
    prompt_token_ids: tuple[tuple[int, ...], ...]


class Answer:
    """One answer in the making."""

    def __init__(self, fmt: Format, options: AnswerOptions) -> None:
        self._format = fmt
        self._options = options
        self._usage = Usage(prompt_tokens=sum(map(len, options.prompt_token_ids)))
        self._created = int(time.time())

    async def respond(
        self, receive: Receive, generation: Generation, *, stream: bool, headers: dict[str, str]
    ) -> Response:
        """The response; `generation` is closed when it is over, or when the client goes away."""
        if stream:
            try:
                # An error before the first token is still a plain error response with its own status.
                first = await until_disconnect(receive, generation.next())
            except BaseException:
                generation.close()
                raise
            return EventStream(self._events(generation, first), generation.close, headers)
        try:
            return json_response(await until_disconnect(receive, self._collect(generation)), headers=headers)
        finally:
            generation.close()

    async def _collect(self, generation: Generation) -> dict[str, Any]:
        pieces: dict[int, Piece] = {}
        prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}
        while (delta := await generation.next()) is not None:
            piece = self._take(delta)
            if delta.prompt_logprobs is not None:
                prompt_logprobs[delta.prompt_index] = delta.prompt_logprobs
            if piece.choice in pieces:
                pieces[piece.choice].extend(piece)
            else:
                pieces[piece.choice] = piece
        per_prompt = max(self._options.num_choices // len(self._options.prompt_token_ids), 1)
        choices = []
        for number in sorted(pieces):
            prompt_index = number // per_prompt
            choice = self._format.choice(pieces[number], prompt_logprobs.get(prompt_index))
            if self._options.return_token_ids:
                choice["prompt_token_ids"] = self._options.prompt_token_ids[prompt_index]
                choice["token_ids"] = pieces[number].token_ids
            choices.append(choice)
        return {**self._head(self._format.object_name), "choices": choices, "usage": self._usage.body()}

    async def _events(self, generation: Generation, first: Delta | None) -> AsyncIterator[bytes]:
        delta = first
        while delta is not None:
            for chunk in self._chunks(delta):
                yield _event(chunk)
            delta = await generation.next()
        if self._options.stream_options.get("include_usage"):
            yield _event({**self._head(self._format.chunk_name), "choices": [], "usage": self._usage.body()})

    def _chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """The chunk of a delta; none while its text is held back and there is nothing else to tell."""
        piece = self._take(delta)
        options = self._options
        is_usage_wanted = bool(options.stream_options.get("continuous_usage_stats"))
        is_news = piece.text or piece.is_first or piece.finish_reason or piece.logprobs is not None
        if not (is_news or options.return_token_ids or is_usage_wanted):
            return
        choice = self._format.chunk_choice(piece)
        if options.return_token_ids:
            choice["token_ids"] = piece.token_ids
        chunk = {**self._head(self._format.chunk_name), "choices": [choice]}
        if is_usage_wanted:
            chunk["usage"] = self._usage.body()
        elif options.stream_options.get("include_usage"):
            chunk["usage"] = None
        yield chunk

    def _take(self, delta: Delta) -> Piece:
        piece = self._format.piece(delta)
        self._usage.add(delta, len(piece.token_ids))
        return piece

    def _head(self, object_name: str) -> dict[str, Any]:
        options = self._options
        return {"id": options.answer_id, "object": object_name, "created": self._created, "model": options.model}


class EventStream(Response):
    """Server-sent events until `events` ends, fails (an error event) or the client goes; `close` is called once."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", **headers}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                await until_disconnect(receive, self._write(send))
        finally:
            self._close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:  # the status is sent: an event is the only way left to tell
            self._close()
            await send({"type": "http.response.body", "body": _event(api_error(error).body()), "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first (`ClientDisconnect`)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            await _cancelled(each)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def _event(content: Any) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def clamped(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
