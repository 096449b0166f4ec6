"""`/v1/chat/completions`: the assistant's next message, with the newer shape of log-probabilities."""

from __future__ import annotations

from typing import Any

from powertrain.serve.answer import Piece, clamped
from powertrain.serve.completions import prompt_logprobs_body, token_name
from powertrain.serve.service import Delta
from powertrain.tokenizer import Tokenizer
from powertrain.types import TokenLogprob


class ChatFormat:
    """Shapes of `chat.completion` and its chunks. The role comes with the first token, not before."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, with_logprobs: bool, with_prompt_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._with_prompt_logprobs = with_prompt_logprobs
        self._started: set[int] = set()

    def piece(self, delta: Delta) -> Piece:
        is_first = delta.choice not in self._started
        self._started.add(delta.choice)
        finish = delta.text.finish_reason
        logprobs = None
        if self._with_logprobs:
            logprobs = {"content": [self._logprob(entry) for entry in delta.text.logprobs or []]}
        return Piece(
            choice=delta.choice,
            text=delta.text.text,
            token_ids=delta.text.token_ids,
            logprobs=logprobs,
            finish_reason=None if finish is None else finish.value,
            stop_reason=delta.text.stop_reason,
            is_first=is_first,
        )

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        top = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
        return {
            **self._named(entry.token_id, entry.logprob),
            "top_logprobs": [self._named(token_id, logprob) for token_id, logprob in top],
        }

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token_name(self._tokenizer, token_id),
            "logprob": clamped(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def chunk_choice(self, piece: Piece) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if piece.is_first else {}
        if piece.text or piece.is_first:
            delta["content"] = piece.text
        return {
            "index": piece.choice,
            "delta": delta,
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def choice(self, piece: Piece, prompt_logprobs: list[TokenLogprob | None] | None) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.choice,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._with_prompt_logprobs and prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_body(self._tokenizer, prompt_logprobs)
        return choice
