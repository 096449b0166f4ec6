"""From a request body to `SamplingParams`: the client's values over the model's own defaults over the field's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from powertrain.serve.protocol import ChatBody, CompletionBody, GenerationBody, check_token_ids, token_bias
from powertrain.types import InvalidRequest, ModelFileError, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16

_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)
_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def load_sampling_defaults(model: Path) -> dict[str, Any]:
    """What the model's `generation_config.json` says of sampling; {} where there is none (GGUF files have none)."""
    path = model / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
        values = {name: config[name] for name in _MODEL_DEFAULTS if config.get(name) is not None}
        SamplingParams(**values)
    except (OSError, ValueError, TypeError, AttributeError, InvalidRequest) as error:
        raise ModelFileError(f"{path}: {error}; correct or remove the file") from None
    return values


def sampling_params(
    body: GenerationBody, defaults: Mapping[str, Any], vocab_size: int, max_tokens: int | None
) -> SamplingParams:
    """The request's parameters. `max_tokens` None means up to the model's length.

    Raises `InvalidRequest` naming the field, with ids out of the vocabulary found here, before the engine sees them.
    """
    values: dict[str, Any] = dict(defaults)
    values |= {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if (values.get("top_k") or 0) > vocab_size:
        if body.top_k is not None:
            raise InvalidRequest(f"top_k must be at most the vocabulary, {vocab_size}, got {body.top_k}", "top_k")
        values["top_k"] = 0
    if isinstance(body, CompletionBody) and body.echo and body.logprobs is not None:
        values.setdefault("prompt_logprobs", body.logprobs)  # an echoed prompt's tokens get log-probabilities too
    stop_token_ids = body.stop_token_ids or []
    check_token_ids(stop_token_ids, vocab_size, "stop_token_ids")
    stop = body.stop if body.stop is not None else ()
    return SamplingParams(
        **values,
        max_tokens=max_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(stop_token_ids),
        logit_bias=token_bias(body.logit_bias, vocab_size),
        logprobs=_num_logprobs(body),
    )


def _num_logprobs(body: GenerationBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= 20:
        raise InvalidRequest(f"top_logprobs must be in [0, 20], got {body.top_logprobs}", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def completion_budget(body: CompletionBody) -> int:
    """`max_tokens` of a completion; 0 only makes sense to have the prompt echoed."""
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens < 1 and not (max_tokens == 0 and body.echo):
        raise InvalidRequest(f"max_tokens must be at least 1 (0 with echo), got {max_tokens}", "max_tokens")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of other than n is not supported; leave it out", "best_of")
    return max_tokens


def chat_budget(body: ChatBody) -> tuple[int | None, str]:
    """Token budget of a chat (None: what the context leaves) and the name of the field it came from."""
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    max_tokens: int | None = getattr(body, name)
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"{name} must be at least 1, got {max_tokens}", name)
    return max_tokens, name


def fit_budget(
    num_prompt_tokens: int, max_tokens: int | None, max_model_len: int, param: str, *, is_given: bool, name: str
) -> int:
    """The budget that fits the model. Raises `InvalidRequest` with both lengths when prompt or sum are too long."""
    if num_prompt_tokens == 0:
        raise InvalidRequest(f"{param} gives no tokens; send at least one", param)
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens, and the model's length is {max_model_len} with at least one "
            "to generate; shorten the prompt",
            param,
        )
    if max_tokens is None or (max_tokens > room and not is_given):
        return room
    if max_tokens > room:
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens and {name} asks for {max_tokens}, together more than the "
            f"model's length of {max_model_len}; ask for at most {room}",
            name,
        )
    return max_tokens
