"""What a model is worth as a draft for another: how many of its greedy tokens in a row the other would also choose.

Greedy speculation (Leviathan et al. 2022, arXiv 2211.17192) always emits the target's own greedy text, whatever the
draft says. So the draft's guesses are judged along that text: after the same tokens it would be asked in service, one
teacher-forced pass gives its likeliest token at every position. As far as its guesses are right, a guess further on is
made after the very tokens of the text; where one is wrong, what it drafts behind it is thrown away. Walking over right
and wrong guesses therefore counts exactly the steps that speculation takes, but for ties that kernels round otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from powertrain.measure.agreement import DEFAULT_PROMPTS, DEFAULT_TOKENS, greedy_texts, read_prompts
from powertrain.measure.scoring import Model, Progress, check_same_vocabulary
from powertrain.measure.statistics import Floats, summarize_ratios

NUM_DRAFTED = tuple(range(1, 9))
"""Drafts per step that are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """A draft's guesses along its target's greedy text, over all prompts.

    `alpha` is the share of tokens that it would have guessed; `length` the mean number of right guesses in a row, which
    is what drafting without a limit has accepted per step; `tokens_per_step` by drafts k = 1..8: tokens of text per
    pass of the target, its own included. `intervals`: 95 %, bootstrap over prompts, by the same names
    (`tokens_per_step_4`); none with one prompt.
    """

    alpha: float
    length: float
    tokens_per_step: Mapping[int, float]
    intervals: Mapping[str, tuple[float, float]]
    num_prompts: int
    num_tokens: int
    max_tokens: int
    data: str

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["tokens_per_step"] = {str(k): value for k, value in self.tokens_per_step.items()}
        return {**values, "intervals": {name: list(bounds) for name, bounds in self.intervals.items()}}


def acceptance(
    draft: Model,
    target: Model,
    data: str | Path,
    *,
    num_prompts: int = DEFAULT_PROMPTS,
    max_tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Acceptance:
    """Along the target's greedy continuations, `max_tokens` at most, of the first `num_prompts` prompts of `data`.

    `seed` is the bootstrap's. Raises `PowertrainError` for models of other vocabularies and for unreadable prompts.
    """
    from powertrain.checkpoint.tokenizer_files import load_tokenizer

    check_same_vocabulary(draft, target)
    tokenizer = load_tokenizer(target.path)
    prompts = read_prompts(data, tokenizer, num_prompts)
    texts = greedy_texts(target, prompts, tokenizer.eos_token_ids, max_tokens, progress)
    guesses = []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        guesses.append(right_guesses(draft, prompt, text))
        if progress is not None:
            progress(f"guesses, {draft.name}", number, len(prompts))
    return summarize_acceptance(guesses, max_tokens=max_tokens, data=str(data), seed=seed)


def right_guesses(draft: Model, prompt: Sequence[int], text: Sequence[int]) -> list[bool]:
    """For each token of `text` whether it is the draft's likeliest after the prompt and the tokens before."""
    token_ids = torch.tensor([*prompt, *text[:-1]], dtype=torch.int64)
    guessed = draft.decoder.score(token_ids)[len(prompt) - 1 :].argmax(-1).cpu()
    right: list[bool] = (guessed == torch.tensor(text)).tolist()
    return right


def num_steps(guesses: Sequence[bool], num_drafted: int) -> int:
    """Passes of the target that speculation needs for a text: each takes right drafts, `num_drafted` at most, and one
    token of its own."""
    steps = at = 0
    while at < len(guesses):
        drafted = guesses[at : at + num_drafted]
        at += (drafted.index(False) if False in drafted else len(drafted)) + 1
        steps += 1
    return steps


def summarize_acceptance(guesses: Sequence[list[bool]], *, max_tokens: int, data: str, seed: int = 0) -> Acceptance:
    """The statistics of right and wrong guesses, one list per prompt."""
    lengths = np.array([len(row) for row in guesses], dtype=np.float64)
    right = np.array([sum(row) for row in guesses], dtype=np.float64)

    def steps(num_drafted: int) -> Floats:
        return np.array([num_steps(row, num_drafted) for row in guesses], dtype=np.float64)

    by_k = {f"tokens_per_step_{k}": (lengths, steps(k)) for k in NUM_DRAFTED}
    summary = summarize_ratios({"alpha": (right, lengths), "length": (right, steps(max_tokens)), **by_k}, seed=seed)
    return Acceptance(
        alpha=summary.values["alpha"],
        length=summary.values["length"],
        tokens_per_step={k: summary.values[f"tokens_per_step_{k}"] for k in NUM_DRAFTED},
        intervals=summary.intervals,
        num_prompts=len(guesses),
        num_tokens=int(lengths.sum()),
        max_tokens=max_tokens,
        data=data,
    )
