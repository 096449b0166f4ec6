"""How a contender in a process of its own is asked to work: one JSON line in, one JSON line out. Standard library only.

A request names a method of the contender and its arguments: `{"do": "step", "count": 64}`. What a method returns is the
answer; `{"error": "..."}` is one that failed. Libraries print as they like: their stdout goes to stderr.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any, Protocol


class Contender(Protocol):
    """One engine with its model loaded. Times are in seconds, logits float32; only one batch is open at a time."""

    def about(self) -> dict[str, Any]:
        """`version`, fixed `settings`, bytes of KV cache a token (`kv_bytes_per_token`), maybe `weight_bytes`."""
        ...

    def choices(self, batch: int) -> dict[str, Any]:
        """`choices`: the settings worth trying for such a batch, each one to be passed to `open` and `run`."""
        ...

    def open(self, batch: int, prompt: int, room: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Compute `batch` prompts of `prompt` random ids up to their first token, with room for `room` more each.

        Returns `seconds`.
        """
        ...

    def step(self, count: int) -> dict[str, Any]:
        """Give every open sequence its next `count` tokens, one step after the other. Returns `seconds` of all."""
        ...

    def close(self) -> dict[str, Any]:
        """Forget the open batch."""
        ...

    def run(self, batch: int, prompt: int, output: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Prompts in, `output` tokens of each out, nothing left open. Returns `seconds` of all of it."""
        ...

    def logits(self, ids: str, out: str) -> dict[str, Any]:
        """Teacher-forced logits of one fresh sequence: .npy int64 [tokens] to .npy float32 [tokens, vocab]."""
        ...


def random_prompts(batch: int, prompt: int, vocab_size: int) -> list[list[int]]:
    """The same uniform ids for every contender, away from both ends of the vocabulary where special tokens live."""
    source = random.Random(batch * 100_003 + prompt)
    return [[source.randrange(10, vocab_size - 10) for _ in range(prompt)] for _ in range(batch)]


def serve(make: type[Contender], *arguments: Any) -> None:
    """Make the contender, say `about()`, then answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    contender = make(*arguments)
    answer(contender.about())
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer(getattr(contender, asked.pop("do"))(**asked))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
