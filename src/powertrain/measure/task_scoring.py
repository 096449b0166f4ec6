"""What a model makes of an item: the log-probability of each candidate answer after its context.

A context that several candidates share is computed once: their sequences point at the same blocks of the cache, as
requests with a common prefix do in the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from powertrain.kernels.attention import AttentionStep
from powertrain.measure.task_data import Item
from powertrain.model.decoder import Decoder, KVCache
from powertrain.tokenizer import Tokenizer
from powertrain.types import PowertrainError

BLOCK_SIZE = 16
STEP_TOKENS = 512
"""Tokens computed in one step: bounds its working memory."""

LOGIT_ROWS = 64
"""Rows of logits there are at once."""


@dataclass(frozen=True, slots=True)
class Question:
    """An item in token ids: per candidate the context and the answer, the first `num_context[i]` given, not scored."""

    sequences: tuple[tuple[int, ...], ...]
    num_context: tuple[int, ...]
    is_cut: bool = False

    def shared(self) -> int:
        """Leading tokens that all sequences have in common and none is scored in, in whole blocks."""
        if len(self.sequences) < 2:
            return 0
        longest = min(min(self.num_context) - 1, min(map(len, self.sequences)) - 1)
        return min(longest, *(_common(self.sequences[0], ids) for ids in self.sequences[1:])) // BLOCK_SIZE * BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Answer:
    """Per candidate: its log-probability in nats, and whether each of its tokens was the likeliest."""

    logprobs: tuple[float, ...]
    is_greedy: tuple[bool, ...]


def encode_item(item: Item, tokenizer: Tokenizer, max_length: int | None, separator: str | None = None) -> Question:
    """The item in token ids: each candidate's text encoded in one piece, scored from where it leaves its context.

    A context too long for `max_length` loses tokens on the left, as many for each candidate. Raises
    `PowertrainError` where nothing of the context would be left.
    """
    sequences, counts = [], []
    for context, continuation in item.texts(separator):
        ids = tokenizer.encode(context + continuation)
        num_context = _common(tokenizer.encode(context), ids)
        if num_context == 0:
            ids, num_context = [_first_token(item, tokenizer), *ids], 1
        if num_context >= len(ids):
            raise PowertrainError(f"line {item.line}: the tokenizer leaves nothing of {continuation!r} to score")
        sequences.append(ids)
        counts.append(num_context)
    # the last token is predicted, not computed
    excess = 0 if max_length is None else max(0, max(map(len, sequences)) - 1 - max_length)
    if excess >= min(counts):
        raise PowertrainError(f"line {item.line}: with {max_length} tokens the model holds no context of this item")
    return Question(
        tuple(tuple(ids[excess:]) for ids in sequences), tuple(count - excess for count in counts), excess > 0
    )


def _first_token(item: Item, tokenizer: Tokenizer) -> int:
    for token_id in (tokenizer.bos_token_id, *tokenizer.eos_token_ids):
        if token_id is not None:
            return token_id
    raise PowertrainError(f"line {item.line}: the context is no token, and the model has none to begin a text with")


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading ids are the same."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


@dataclass(slots=True)
class _Run:
    """A sequence being computed: `ids` from position `at`, in the blocks of `table`; hidden rows kept from `first`."""

    ids: tuple[int, ...]
    table: list[int]
    at: int
    first: int
    hidden: list[torch.Tensor] = field(default_factory=list)


def answer(decoder: Decoder, questions: Sequence[Question]) -> list[Answer]:
    """Score all candidates of `questions` together, shared contexts first, then what differs.

    Raises `PowertrainError` if the model gives no finite probabilities.
    """
    prefixes: list[_Run] = []
    runs: list[_Run] = []
    targets: list[int] = []
    num_blocks = 0
    for question in questions:
        shared = question.shared()
        head = list(range(num_blocks, num_blocks + shared // BLOCK_SIZE))
        num_blocks += len(head)
        prefixes.append(_Run(question.sequences[0][:shared], head, 0, shared))
        for ids, num_context in zip(question.sequences, question.num_context, strict=True):
            own = -(-(len(ids) - 1 - shared) // BLOCK_SIZE)
            table = [*head, *range(num_blocks, num_blocks + own)]
            num_blocks += own
            runs.append(_Run(ids[:-1], table, shared, num_context - 1))
            targets.extend(ids[num_context:])
    cache = decoder.new_cache(num_blocks, BLOCK_SIZE)
    _compute(decoder, cache, prefixes)
    _compute(decoder, cache, runs)
    logprobs, is_likeliest = _score(decoder, torch.cat([rows for run in runs for rows in run.hidden]), targets)
    return _gather(questions, logprobs, is_likeliest)


def _compute(decoder: Decoder, cache: KVCache, runs: Sequence[_Run]) -> None:
    """Bring every run to its end, at most `STEP_TOKENS` tokens in a step."""
    pending = [run for run in runs if run.at < len(run.ids)]
    while pending:
        parts: list[tuple[_Run, int]] = []
        room = STEP_TOKENS
        for run in pending:
            count = min(len(run.ids) - run.at, room)
            parts += [(run, count)] if count else []
            room -= count
        parts.sort(key=lambda part: part[1] != 1)  # single tokens first, as the attention op wants them
        _step(decoder, cache, parts)
        pending = [run for run in pending if run.at < len(run.ids)]


def _step(decoder: Decoder, cache: KVCache, parts: Sequence[tuple[_Run, int]]) -> None:
    contexts = [run.at + count for run, count in parts]
    tables = np.zeros((len(parts), -(-max(contexts) // BLOCK_SIZE)), dtype=np.int64)
    for row, (run, _) in zip(tables, parts, strict=True):
        used = run.table[: len(row)]
        row[: len(used)] = used
    step = AttentionStep([count for _, count in parts], contexts, tables, BLOCK_SIZE, decoder.device)
    ids = [token_id for run, count in parts for token_id in run.ids[run.at : run.at + count]]
    hidden = decoder.forward(torch.tensor(ids, dtype=torch.int64).to(decoder.device), step, cache)
    begin = 0
    for run, count in parts:
        run.hidden.append(hidden[begin : begin + count][max(0, run.first - run.at) :])
        run.at += count
        begin += count


@torch.inference_mode()
def _score(decoder: Decoder, hidden: torch.Tensor, targets: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Per row of hidden [rows, hidden], the target's log-probability and whether it is the likeliest token."""
    logprobs: list[float] = []
    is_likeliest: list[bool] = []
    for begin in range(0, len(targets), LOGIT_ROWS):
        log_p = torch.log_softmax(decoder.logits(hidden[begin : begin + LOGIT_ROWS]), dim=-1)
        target = torch.tensor(targets[begin : begin + LOGIT_ROWS], device=log_p.device)
        logprobs += log_p.gather(1, target.unsqueeze(1)).squeeze(1).tolist()
        is_likeliest += (log_p.argmax(dim=-1) == target).tolist()
    return logprobs, is_likeliest


def _gather(questions: Sequence[Question], logprobs: Sequence[float], is_likeliest: Sequence[bool]) -> list[Answer]:
    answers = []
    begin = 0
    for question in questions:
        sums, greedy = [], []
        for ids, num_context in zip(question.sequences, question.num_context, strict=True):
            rows = slice(begin, begin + len(ids) - num_context)
            sums.append(math.fsum(logprobs[rows]))
            greedy.append(all(is_likeliest[rows]))
            begin = rows.stop
        if not all(map(math.isfinite, sums)):
            raise PowertrainError("the model gives no finite probabilities: it is broken")
        answers.append(Answer(tuple(sums), tuple(greedy)))
    return answers
