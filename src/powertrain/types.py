"""Nouns that cross layers. Standard library only: the web process and the property tests import this without torch."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class PowertrainError(Exception):
    """Something the user can act on: the message names the field or file and says what to do."""


class InvalidRequest(PowertrainError):
    """A request that can never be honoured. `param` names the offending field as the client sent it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ModelFileError(PowertrainError):
    """A model file or folder that is absent, truncated, hostile or of an unsupported kind."""


class FinishReason(enum.StrEnum):
    """Why a sequence ended. `ABORT` is ours or the client's; `ERROR` is a fault in this sequence's own step."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


MAX_LOGPROBS = 20
MAX_N = 16
MAX_STOP_STRINGS = 16


def _check_number(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    inside = low < value <= high if low_open else low <= value <= high
    if not (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and inside):
        raise InvalidRequest(f"{name} must be in {'(' if low_open else '['}{low}, {high}], got {value!r}", name)


def _check_count(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be an integer in [{low}, {high}], got {value!r}", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to turn logits into tokens. Names, defaults and meaning are those of vLLM and the OpenAI API.

    `temperature` 0 is greedy. `top_k` 0 or -1 is off. `seed` makes a request repeatable whatever else is in its batch.
    `logprobs` k returns, per generated token, its own log-probability and those of the k most likely tokens, from the
    model's own distribution (before penalties, bias, temperature and truncation); `prompt_logprobs` the same for the
    prompt. `max_tokens` None means up to the model's length. Raises `InvalidRequest` naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        stop: Any = self.stop  # vLLM's users also give one string, or a list
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        _check_count("n", self.n, 1, MAX_N)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_count("top_k", self.top_k, -1, 2**31 - 1)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_count("seed", self.seed, -(2**63), 2**63 - 1)
        _check_count("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _check_count("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _check_count("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_count("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})", "min_tokens")
        if len(self.stop) > MAX_STOP_STRINGS or any(not isinstance(s, str) or not s for s in self.stop):
            raise InvalidRequest(f"stop must be at most {MAX_STOP_STRINGS} non-empty strings", "stop")
        for token_id in self.stop_token_ids:
            _check_count("stop_token_ids", token_id, 0, 2**31 - 1)
        for token_id, bias in self.logit_bias.items():
            _check_count("logit_bias", token_id, 0, 2**31 - 1)
            _check_number("logit_bias", bias, -100.0, 100.0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt for the engine, in token ids. `sampling.n` sequences share it and are told apart by `index`.

    `eos_token_ids` end a sequence unless `sampling.ignore_eos`. Requests with different `cache_salt` never share
    cached blocks. Stop strings are the text layer's work: it aborts the sequence when one is complete.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of the k most likely ones there (descending; may or may not hold the token).

    The same float stands in `logprob` and in `top_logprobs` where the token is among the top.
    """

    token_id: int
    logprob: float
    rank: int
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True, kw_only=True)
class TokenOutput:
    """What one step gave one sequence. `token_ids` are the new ones (several after an accepted draft).

    The last output of a sequence carries `finish_reason`; a stop token or eos that ended it IS in `token_ids`, and its
    id in `stop_token_id`; the text layer leaves it out of the text. `prompt_logprobs` (first entry None) comes once,
    with the first output. `num_cached_tokens` is how much of the prompt the prefix cache held.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine, cheap enough to send with every step. Counters only grow; gauges are of now."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_in_use: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_drafts: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    step_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a text layer must know of a ready engine."""

    model: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    device: str
    dtype: str
    kernels: str = ""
    """What runs the ops, for the start line: `native kernels: avx2`, or why there are none. Empty: nothing to say."""
    startup_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """An integer weight grid, in compressed-tensors' words; `group_size` None is one group per output row (channel).

    `num_bits` is 2 to 8. `activation_bits` 8, which goes with weights of 4 or 8 bits, rounds a product's input too, on
    a symmetric grid found at run time: one per token, or one per `activation_group_size` inputs of it. None leaves it
    float.
    """

    num_bits: int
    group_size: int | None = None
    symmetric: bool = True
    activation_bits: int | None = None
    activation_group_size: int | None = None

    def __post_init__(self) -> None:
        if type(self.num_bits) is not int or not 2 <= self.num_bits <= 8:
            raise PowertrainError(f"num_bits must be 2 to 8, got {self.num_bits}")
        if self.activation_bits not in (None, 8):
            raise PowertrainError(f"activation_bits must be 8 or None, got {self.activation_bits}")
        if self.activation_bits is not None and self.num_bits not in (4, 8):
            raise PowertrainError(f"num_bits must be 4 or 8 where activation_bits is 8, got {self.num_bits}")

    @property
    def strategy(self) -> Literal["channel", "group"]:
        return "channel" if self.group_size is None else "group"
