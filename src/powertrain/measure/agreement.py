"""How long a candidate writes what the reference writes: tokens until their greedy texts first differ.

Teacher-forced statistics start every token from the same text; this one does not, so it shows how soon a service
would notice. A pair that never differs counts with all its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powertrain.engine.offline import run_offline
from powertrain.measure.scoring import Model, Progress, check_same_vocabulary
from powertrain.text_data import read_utf8
from powertrain.tokenizer import Tokenizer
from powertrain.types import PowertrainError, Request, SamplingParams

DEFAULT_PROMPTS = 50
DEFAULT_TOKENS = 128

_FIELDS = ("messages", "turns", "prompt", "question", "query", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Tokens until the first difference: median and quartiles over prompts; `identical` is the share without any.

    `lengths` has one number per prompt; none exceeds `max_tokens`, after which nobody looked.
    """

    median: float
    p25: float
    p75: float
    identical: float
    lengths: tuple[int, ...]
    num_prompts: int
    max_tokens: int
    data: str

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "lengths": list(self.lengths)}


def read_prompts(path: str | Path, tokenizer: Tokenizer, num_prompts: int) -> list[tuple[int, ...]]:
    """The first prompts of a file in token ids: a line of text each, or of JSON in a `.jsonl` file.

    A JSON line holds `messages` or `turns` (the first one), put through the chat template, or `prompt`, `question`,
    `query` or `text`, taken as it is. Raises `PowertrainError` naming file and line.
    """
    path = Path(path)
    if num_prompts < 1:
        raise PowertrainError(f"num_prompts must be at least 1, got {num_prompts}")
    text = read_utf8(path, "give a file of text or JSON lines")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()][:num_prompts]
    if not lines:
        raise PowertrainError(f"{path}: holds no prompts")
    is_json = path.name.removesuffix(".gz").endswith(".jsonl")
    prompts = []
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            prompts.append(tuple(_json_prompt(line, tokenizer) if is_json else tokenizer.encode(line)))
        except (PowertrainError, ValueError) as error:
            raise PowertrainError(f"{where}: {error}") from None
    return prompts


def _json_prompt(line: str, tokenizer: Tokenizer) -> list[int]:
    row: Any = json.loads(line)
    if isinstance(row, dict):
        for name in _FIELDS:
            value = row.get(name)
            if name == "turns" and isinstance(value, list) and value and isinstance(value[0], str):
                return tokenizer.apply_chat_template([{"role": "user", "content": value[0]}])
            if name == "messages" and isinstance(value, list) and value:
                return tokenizer.apply_chat_template(value)
            if name not in ("messages", "turns") and isinstance(value, str) and value.strip():
                return tokenizer.encode(value)
    raise PowertrainError(f"none of the fields {', '.join(_FIELDS)} holds a prompt")


def agreement(
    candidate: Model,
    reference: Model,
    data: str | Path,
    *,
    num_prompts: int = DEFAULT_PROMPTS,
    max_tokens: int = DEFAULT_TOKENS,
    progress: Progress | None = None,
) -> Agreement:
    """Continue the first `num_prompts` prompts of `data` greedily with both models, `max_tokens` at most."""
    from powertrain.checkpoint.tokenizer_files import load_tokenizer

    check_same_vocabulary(candidate, reference)
    tokenizer = load_tokenizer(reference.path)
    prompts = read_prompts(data, tokenizer, num_prompts)
    eos = tokenizer.eos_token_ids
    theirs, ours = (greedy_texts(model, prompts, eos, max_tokens, progress) for model in (reference, candidate))
    pairs = list(zip(theirs, ours, strict=True))
    lengths = tuple(_first_difference(one, other) for one, other in pairs)
    p25, median, p75 = (float(value) for value in np.percentile(lengths, (25, 50, 75)))
    return Agreement(
        median=median,
        p25=p25,
        p75=p75,
        identical=sum(one == other for one, other in pairs) / len(pairs),
        lengths=lengths,
        num_prompts=len(prompts),
        max_tokens=max_tokens,
        data=str(data),
    )


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def greedy_texts(
    model: Model,
    prompts: Sequence[tuple[int, ...]],
    eos_token_ids: tuple[int, ...],
    max_tokens: int,
    progress: Progress | None,
) -> list[list[int]]:
    """What the engine writes after each prompt, `max_tokens` at most, end tokens included. Raises `PowertrainError`."""
    if max_tokens < 1:
        raise PowertrainError(f"max_tokens must be at least 1, got {max_tokens}")
    longest = max(map(len, prompts)) + max_tokens
    if model.max_length is not None and longest > model.max_length:
        raise PowertrainError(f"a prompt and {max_tokens} tokens are {longest}: {model.name} holds {model.max_length}")
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    requests = [
        Request(request_id=str(index), prompt_token_ids=ids, sampling=sampling, eos_token_ids=eos_token_ids)
        for index, ids in enumerate(prompts)
    ]

    def watch(num_written: int, num_done: int) -> None:
        if progress is not None:
            progress(f"greedy text, {model.name}", num_done, len(prompts))

    return run_offline(model.decoder, requests, longest, watch=watch)
