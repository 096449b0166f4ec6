"""`/v1/completions`: text of each prompt's continuation, with the legacy shape of log-probabilities."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from powertrain.serve.answer import Piece, clamped
from powertrain.serve.service import Delta
from powertrain.tokenizer import Tokenizer
from powertrain.types import TokenLogprob


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a string that no other token of the same place shares, so far as the format allows it."""
    piece = tokenizer.token_bytes(token_id)
    if not piece:
        return f"token_id:{token_id}"
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def top_logprobs(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, float]:
    """The most likely tokens and, always, the chosen one, with the very float of `token_logprobs`.

    Where two tokens have one name, the likelier keeps it: `max` of the values is the largest log-probability.
    """
    top: dict[str, float] = {}
    for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True):
        top.setdefault(token_name(tokenizer, token_id), clamped(logprob))
    top.setdefault(token_name(tokenizer, entry.token_id), clamped(entry.logprob))
    return top


def prompt_logprobs_body(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None]
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: per prompt token a map from token id to its log-probability, rank and text."""
    body: list[dict[str, dict[str, Any]] | None] = []
    for entry in entries:
        if entry is None:
            body.append(None)
            continue
        ranked = [*zip(entry.top_token_ids, entry.top_logprobs, range(1, len(entry.top_token_ids) + 1), strict=True)]
        place: dict[str, dict[str, Any]] = {}
        for token_id, logprob, rank in [*ranked, (entry.token_id, entry.logprob, entry.rank)]:
            text = tokenizer.token_text(token_id)
            place[str(token_id)] = {"logprob": clamped(logprob), "rank": rank, "decoded_token": text}
        body.append(place)
    return body


class TokenOffsets:
    """Where each token starts in the text, in characters: a token that ends inside a character starts none."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, start: int) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._next = start

    def of(self, token_id: int) -> int:
        here = self._next
        if token_id not in self._skipped:
            self._next += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))
        return here


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOptions:
    """`echoed` holds each prompt's text when the prompt is to be repeated; `is_discarding` drops what is generated."""

    prompt_token_ids: tuple[tuple[int, ...], ...]
    echoed: tuple[str, ...] | None
    with_logprobs: bool
    with_prompt_logprobs: bool
    skip_special_tokens: bool
    is_discarding: bool


@dataclass(slots=True)
class _Choice:
    offsets: TokenOffsets
    is_started: bool = False


class CompletionFormat:
    """Shapes of `text_completion`, chunk and body alike."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, tokenizer: Tokenizer, options: CompletionOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._choices: dict[int, _Choice] = {}
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}

    def piece(self, delta: Delta) -> Piece:
        options = self._options
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[delta.prompt_index] = delta.prompt_logprobs
        choice = self._choices.setdefault(
            delta.choice, _Choice(TokenOffsets(self._tokenizer, options.skip_special_tokens, 0))
        )
        is_first, choice.is_started = not choice.is_started, True
        finish = delta.text.finish_reason
        piece = Piece(choice=delta.choice, text="", token_ids=[], is_first=is_first)
        piece.logprobs = _empty_logprobs() if options.with_logprobs else None
        if is_first and options.echoed is not None:
            self._echo(piece, choice, delta.prompt_index)
        piece.finish_reason = None if finish is None else finish.value
        if options.is_discarding:
            piece.finish_reason = None if finish is None else "length"
            return piece
        piece.text += delta.text.text
        piece.token_ids = delta.text.token_ids
        piece.stop_reason = delta.text.stop_reason
        if piece.logprobs is not None:
            for entry in delta.text.logprobs or []:
                self._add_logprob(piece.logprobs, choice, entry.token_id, entry)
        return piece

    def _echo(self, piece: Piece, choice: _Choice, prompt_index: int) -> None:
        assert self._options.echoed is not None
        piece.text = self._options.echoed[prompt_index]
        if piece.logprobs is None:
            return
        prompt = self._options.prompt_token_ids[prompt_index]
        entries = self._prompt_logprobs.get(prompt_index) or [None] * len(prompt)
        for token_id, entry in zip(prompt, entries, strict=True):
            self._add_logprob(piece.logprobs, choice, token_id, entry)

    def _add_logprob(
        self, logprobs: dict[str, list[Any]], choice: _Choice, token_id: int, entry: TokenLogprob | None
    ) -> None:
        logprobs["tokens"].append(token_name(self._tokenizer, token_id))
        logprobs["token_logprobs"].append(None if entry is None else clamped(entry.logprob))
        logprobs["top_logprobs"].append(None if entry is None else top_logprobs(self._tokenizer, entry))
        logprobs["text_offset"].append(choice.offsets.of(token_id))

    def chunk_choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def choice(self, piece: Piece, prompt_logprobs: list[TokenLogprob | None] | None) -> dict[str, Any]:
        choice = self.chunk_choice(piece)
        if self._options.with_prompt_logprobs and prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_body(self._tokenizer, prompt_logprobs)
        return choice


def _empty_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
