"""Text sampled from a model itself: the evaluation data for which nobody needs a data set.

A model's own samples are what it will be asked to continue in service, and the expected KL divergence under them is
the divergence between the two models as generators of whole texts.
"""

from __future__ import annotations

from collections.abc import Callable

from powertrain.engine.offline import run_offline
from powertrain.model.decoder import Decoder
from powertrain.text_data import Window
from powertrain.tokenizer import Tokenizer
from powertrain.types import Request, SamplingParams

Progress = Callable[[str, float, float | None], None]

# Openings for a model with a chat template: the kinds of things people ask, and no evaluation item.
_QUESTIONS = (
    "Tell me a short story about a lighthouse.",
    "Explain how a bicycle stays upright.",
    "Write a Python function that reverses a list.",
    "What should I cook tonight with rice and eggs?",
    "Summarize the causes of the tides in three sentences.",
    "Write a polite email asking for a day off.",
    "Give me five ideas for a rainy afternoon.",
    "What is the difference between weather and climate?",
)
# Openings for a model that has neither a template nor a token to begin with.
_BEGINNINGS = ("The", "In", "A", "It was", "When", "There", "One day", "How")


def sample_windows(
    decoder: Decoder,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    window: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Window]:
    """Windows of `window` tokens that the model wrote at temperature 1, about `num_tokens` in all.

    The openings (answers to a few questions where there is a chat template, the bare first token in between) are
    context: only sampled tokens are scored. Each window has its own seed, so the same arguments give the same text on
    the same machine. Raises `PowertrainError` if a sequence fails.
    """
    num_windows = max(1, num_tokens // window)
    openings = [_opening(tokenizer, index, window) for index in range(num_windows)]
    requests = [
        Request(
            request_id=str(index),
            prompt_token_ids=opening,
            sampling=SamplingParams(
                temperature=1.0, max_tokens=window - len(opening), ignore_eos=True, seed=seed * 1_000_003 + index
            ),
        )
        for index, opening in enumerate(openings)
    ]
    total = sum(window - len(opening) for opening in openings)

    def watch(num_sampled: int, num_done: int) -> None:
        if progress is not None:
            progress("sample text", num_sampled, total)

    sampled = run_offline(decoder, requests, window, watch=watch)
    return [Window((*opening, *ids), len(opening)) for opening, ids in zip(openings, sampled, strict=True)]


def own_texts(
    model: str, num_samples: int, length: int, *, seed: int = 0, progress: Progress | None = None
) -> list[list[int]]:
    """`num_samples` windows of `length` tokens that a model wrote, to calibrate it on: its openings belong to them."""
    from powertrain.checkpoint.tokenizer_files import load_tokenizer
    from powertrain.measure.scoring import read_model

    read = read_model(model)
    tokenizer = load_tokenizer(read.path)
    num_tokens = num_samples * length
    windows = sample_windows(
        read.decoder, tokenizer, num_tokens=num_tokens, window=length, seed=seed, progress=progress
    )
    return [list(window.token_ids) for window in windows]


def _opening(tokenizer: Tokenizer, index: int, window: int) -> tuple[int, ...]:
    """At least one token and at most half a window."""
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else list(tokenizer.eos_token_ids[:1])
    if tokenizer.chat_template is not None and index % 2 == 0:
        question = _QUESTIONS[index // 2 % len(_QUESTIONS)]
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        if len(ids) <= window // 2:
            return tuple(ids)
    return tuple(first or tokenizer.encode(_BEGINNINGS[index % len(_BEGINNINGS)])[: max(1, window // 2)])
