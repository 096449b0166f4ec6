"""The routes that take a body: read it strictly, check it against model and engine, run it, answer."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from powertrain.serve import protocol, sampling
from powertrain.serve.answer import Answer, AnswerOptions
from powertrain.serve.chat import ChatFormat
from powertrain.serve.completions import CompletionFormat, CompletionOptions
from powertrain.serve.errors import ApiError, json_response
from powertrain.serve.json_body import parse_json_object
from powertrain.serve.protocol import B, ChatBody, CompletionBody, DetokenizeBody, GenerationBody, TokenizeBody
from powertrain.serve.service import Job, Slot, TextService
from powertrain.types import InvalidRequest, PowertrainError, SamplingParams

T = TypeVar("T")

INLINE_CHARS = 4096
"""Longer texts are tokenized, and larger bodies parsed, in a thread, so that streams keep flowing."""
MAX_IGNORED_NAMES = 20


class Endpoints:
    """`defaults` are the model's own sampling defaults; `model_name` is the only model there is."""

    def __init__(self, service: TextService, model_name: str, defaults: Mapping[str, Any]) -> None:
        self._service = service
        self._tokenizer = service.tokenizer
        self._info = service.engine.info
        self._model_name = model_name
        self._defaults = defaults

    async def completions(self, http: HttpRequest) -> Response:
        body, headers = await self._read(http, CompletionBody)
        prompts = protocol.prompt_list(body.prompt)
        max_tokens = sampling.completion_budget(body)
        # The parameters are checked before any prompt is tokenized; each prompt's own budget comes after.
        params = self._params(body, max(max_tokens, 1))
        slot = self._service.admit(len(prompts), params.n)
        try:
            ids = [tuple(await self._prompt_ids(prompt, body.add_special_tokens)) for prompt in prompts]
            options = CompletionOptions(
                prompt_token_ids=tuple(ids),
                echoed=self._echoed(prompts, params) if body.echo else None,
                with_logprobs=body.logprobs is not None,
                with_prompt_logprobs=body.prompt_logprobs is not None,
                skip_special_tokens=params.skip_special_tokens,
                is_discarding=max_tokens == 0,
            )
            fmt = CompletionFormat(self._tokenizer, options)
            fitted = self._fit(params, ids, "prompt", is_given=body.max_tokens is not None, name="max_tokens")
            job = Job(prompts=tuple(ids), sampling=fitted, cache_salt=body.cache_salt or "")
            return await self._run(http, body, job, slot, Answer(fmt, self._options("cmpl", body, job)), headers)
        finally:
            slot.release_unless_owned()

    async def chat(self, http: HttpRequest) -> Response:
        body, headers = await self._read(http, ChatBody)
        messages, unknown = protocol.chat_messages(body.messages)
        _add_ignored(headers, unknown)
        max_tokens, name = sampling.chat_budget(body)
        params = self._params(body, max_tokens)
        slot = self._service.admit(1, params.n)
        try:
            ids = await self._chat_ids(messages, body.add_generation_prompt, body.continue_final_message)
            fmt = ChatFormat(
                self._tokenizer,
                with_logprobs=bool(body.logprobs),
                with_prompt_logprobs=body.prompt_logprobs is not None,
            )
            fitted = self._fit(params, [ids], "messages", is_given=max_tokens is not None, name=name)
            job = Job(prompts=(tuple(ids),), sampling=fitted, cache_salt=body.cache_salt or "")
            return await self._run(http, body, job, slot, Answer(fmt, self._options("chatcmpl", body, job)), headers)
        finally:
            slot.release_unless_owned()

    async def tokenize(self, http: HttpRequest) -> Response:
        body, headers = await self._read(http, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give either prompt or messages", "prompt")
        if body.messages is not None:
            messages, unknown = protocol.chat_messages(body.messages)
            _add_ignored(headers, unknown)
            ids = await self._chat_ids(messages, body.add_generation_prompt, body.continue_final_message)
        else:
            ids = await self._prompt_ids(body.prompt or "", body.add_special_tokens)
        strings = [self._tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
        content = {
            "count": len(ids),
            "max_model_len": self._info.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }
        return json_response(content, headers=headers)

    async def detokenize(self, http: HttpRequest) -> Response:
        body, headers = await self._read(http, DetokenizeBody)
        protocol.check_token_ids(body.tokens, self._info.vocab_size, "tokens")
        text = await _in_thread_if(
            len(body.tokens) > INLINE_CHARS, self._tokenizer.decode, body.tokens, skip_special_tokens=False
        )
        return json_response({"prompt": text}, headers=headers)

    async def _read(self, http: HttpRequest, kind: type[B]) -> tuple[B, dict[str, str]]:
        """The typed body and the headers its answer starts with."""
        media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(415, f"content-type must be application/json, got {media_type[:80]!r}", param=None)
        encoding = http.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise ApiError(415, f"content-encoding {encoding[:80]!r} is not supported; send the body as it is")
        raw = await http.body()
        body, unknown = protocol.parse_body(kind, await _in_thread_if(len(raw) > INLINE_CHARS, parse_json_object, raw))
        self.check_model(body.model)
        headers: dict[str, str] = {}
        _add_ignored(headers, unknown)
        return body, headers

    def check_model(self, model: str | None) -> None:
        """404 unless `model` is the one served here; leaving it out is fine."""
        if model is not None and model != self._model_name:
            raise ApiError(
                404,
                f"there is no model {model[:200]!r} here; this server has {self._model_name!r}",
                param="model",
                code="model_not_found",
            )

    def _params(self, body: GenerationBody, max_tokens: int | None) -> SamplingParams:
        return sampling.sampling_params(body, self._defaults, self._info.vocab_size, max_tokens)

    def _fit(
        self, params: SamplingParams, prompts: Sequence[Sequence[int]], param: str, *, is_given: bool, name: str
    ) -> tuple[SamplingParams, ...]:
        max_model_len = self._info.max_model_len
        return tuple(
            dataclasses.replace(
                params,
                max_tokens=sampling.fit_budget(
                    len(prompt), params.max_tokens, max_model_len, param, is_given=is_given, name=name
                ),
            )
            for prompt in prompts
        )

    async def _prompt_ids(self, prompt: str | list[int], add_special_tokens: bool | None) -> list[int]:
        if not isinstance(prompt, str):
            protocol.check_token_ids(prompt, self._info.vocab_size, "prompt")
            return prompt
        is_special = add_special_tokens is None or add_special_tokens
        return await _in_thread_if(len(prompt) > INLINE_CHARS, self._tokenizer.encode, prompt, is_special)

    async def _chat_ids(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool | None, continue_final: bool | None
    ) -> list[int]:
        adds_prompt = not continue_final if add_generation_prompt is None else add_generation_prompt
        try:
            # Always in a thread: a template is a program of the model's author.
            return await asyncio.to_thread(
                self._tokenizer.apply_chat_template, messages, adds_prompt, bool(continue_final)
            )
        except InvalidRequest:
            raise
        except PowertrainError as error:
            raise InvalidRequest(str(error), "messages") from None

    def _echoed(self, prompts: Sequence[str | list[int]], params: SamplingParams) -> tuple[str, ...]:
        decode = self._tokenizer.decode
        return tuple(p if isinstance(p, str) else decode(p, params.skip_special_tokens) for p in prompts)

    def _options(self, prefix: str, body: GenerationBody, job: Job) -> AnswerOptions:
        return AnswerOptions(
            answer_id=f"{prefix}-{uuid.uuid4().hex}",
            model=self._model_name,
            num_choices=len(job.prompts) * job.n,
            stream_options=body.stream_options or {},
            return_token_ids=bool(body.return_token_ids),
            prompt_token_ids=job.prompts,
        )

    async def _run(
        self, http: HttpRequest, body: GenerationBody, job: Job, slot: Slot, answer: Answer, headers: dict[str, str]
    ) -> Response:
        generation = self._service.start(job, slot)
        return await answer.respond(http.receive, generation, stream=bool(body.stream), headers=headers)


def _add_ignored(headers: dict[str, str], names: Sequence[str]) -> None:
    """Say which fields nobody here knew; a client that spells one wrong can find out."""
    known = headers.get("x-powertrain-ignored", "")
    safe = [name[:64] for name in names if name.isascii() and name.isprintable() and "," not in name]
    if merged := ", ".join([*filter(None, [known]), *safe[:MAX_IGNORED_NAMES]]):
        headers["x-powertrain-ignored"] = merged


async def _in_thread_if(is_long: bool, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return await asyncio.to_thread(function, *args, **kwargs) if is_long else function(*args, **kwargs)
