"""The OpenAI and vLLM request bodies: which fields there are, and what each one that is given means.

No accepted field is ignored. Three kinds are told apart: fields of the models below are honoured; those of `REFUSED`
get a 400 that names them, unless they hold the value that changes nothing; those of `HARMLESS` say nothing about the
answer. A field that nobody here knows is left out and named in the `x-powertrain-ignored` response header.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from powertrain.types import InvalidRequest

MAX_BATCHED_PROMPTS = 256


class Body(BaseModel):
    """Strict: "5" is no number and 1 is no boolean. Every optional field may also be null, which means not given."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None


class GenerationBody(Body):
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: dict[str, bool | None] | None = None
    return_token_ids: bool | None = None


class CompletionBody(GenerationBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class ChatBody(GenerationBody):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class TokenizeBody(Body):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    tokens: list[int]


HARMLESS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"})
"""Fields about bookkeeping, or about tools there are none of: they cannot change an answer of this server."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "reasoning": (),
    "thinking_token_budget": (),
    "verbosity": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "priority": (0,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "logits_processors": ([],),
    "spaces_between_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "kv_transfer_params": (),
    "lora_request": (),
    "n_discard": (0,),
    "background": (False,),
}
"""Fields that this server does not have, each with the values beside null that ask for nothing."""

_SHAPES = {
    "prompt": "must be a string, a list of strings, a list of token ids or a list of lists of token ids",
    "stop": "must be a string or a list of strings",
    "logit_bias": "must be an object from token id to a number",
    "stream_options": "must be an object of booleans",
}

_STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats"})

B = TypeVar("B", bound=Body)


def parse_body(kind: type[B], body: dict[str, Any]) -> tuple[B, list[str]]:
    """The typed request, and the names of fields nobody here knows. Raises `InvalidRequest` naming the field."""
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from None
    unknown = []
    for name, value in (request.model_extra or {}).items():
        if name in REFUSED:
            _refuse(name, value)
        elif name not in HARMLESS:
            unknown.append(name)
    if isinstance(request, GenerationBody):
        _check_options(request)
    return request, unknown


def _invalid(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = first["loc"]
    field = str(place[0]) if place else None
    if field in _SHAPES and first["type"] != "missing":
        return InvalidRequest(f"{field} {_SHAPES[field]}", field)
    where = ".".join(str(part) for part in place)
    return InvalidRequest(f"{where}: {first['msg']}", field)


def _refuse(name: str, value: Any) -> None:
    if value is None:
        return
    for harmless in REFUSED[name]:
        if value == harmless and isinstance(value, bool) == isinstance(harmless, bool):
            return
    allowed = " or ".join(repr(harmless) for harmless in REFUSED[name])
    hint = f"; leave it out{f' or give {allowed}' if allowed else ''}"
    raise InvalidRequest(f"{name} is not supported by this server{hint}", name)


def _check_options(request: GenerationBody) -> None:
    if request.stream_options is not None:
        if not request.stream:
            raise InvalidRequest("stream_options needs stream: true", "stream_options")
        asked = {name for name, value in request.stream_options.items() if value}
        if unknown := sorted(asked - _STREAM_OPTIONS):
            raise InvalidRequest(f"stream_options has no option {unknown[0]!r}", "stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs cannot be streamed", "prompt_logprobs")


def prompt_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a completion request, one by one. Raises `InvalidRequest` for none, empty ones and too many."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt must not be an empty list", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > MAX_BATCHED_PROMPTS:
        raise InvalidRequest(f"prompt holds {len(prompt)} prompts; at most {MAX_BATCHED_PROMPTS}", "prompt")
    return list(prompt)


_CHAT_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id", "audio")


def chat_messages(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages as the template takes them, and the names of message fields that were left out.

    `developer` is OpenAI's newer word for `system`. Raises `InvalidRequest` for tools and for roles nobody has.
    """
    if not messages:
        raise InvalidRequest("messages must not be empty", "messages")
    plain, unknown = [], set()
    for index, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str) or role not in _CHAT_ROLES:
            known = ", ".join(_CHAT_ROLES)
            raise InvalidRequest(f"messages[{index}].role must be one of {known}", f"messages[{index}].role")
        for name in _TOOL_FIELDS:
            if message.get(name):
                raise InvalidRequest(f"messages[{index}].{name} is not supported", f"messages[{index}].{name}")
        entry: dict[str, Any] = {"role": _CHAT_ROLES[role], "content": message.get("content")}
        if entry["content"] is None and role != "assistant":
            raise InvalidRequest(f"messages[{index}].content must not be null", f"messages[{index}].content")
        if message.get("name") is not None:
            entry["name"] = message["name"]
        unknown |= {f"messages[].{name}" for name in message.keys() - {"role", "content", "name", *_TOOL_FIELDS}}
        plain.append(entry)
    return plain, sorted(unknown)


def token_bias(logit_bias: Mapping[str, float] | None, vocab_size: int) -> dict[int, float]:
    """JSON's string keys as token ids. Raises `InvalidRequest` for a key that is no id of this vocabulary."""
    bias: dict[int, float] = {}
    for key, value in (logit_bias or {}).items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) <= 10 else -1
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"logit_bias key {key[:40]!r} is no token id below {vocab_size}", "logit_bias")
        bias[token_id] = value
    return bias


def check_token_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """Raises `InvalidRequest` when one of `ids` is not in the vocabulary."""
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(f"{param} holds {token_id}, which is no token id below {vocab_size}", param)
