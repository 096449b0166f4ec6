"""Plan to tokens: builds the step's inputs, runs the decoder, samples, verifies drafts. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

import numpy as np
import torch

from powertrain.engine.sampler import Row, logprobs_of, num_candidates, sample, sample_top
from powertrain.engine.scheduler import Chunk, Plan, Sequence
from powertrain.kernels.attention import AttentionStep
from powertrain.model.decoder import Decoder, KVCache
from powertrain.types import TokenLogprob

# Prompt log-probabilities need logits for every position: this many rows at a time bounds their memory.
_PROMPT_LOGIT_ROWS = 256


@dataclass(slots=True)
class StepResult:
    """Per sequence: the accepted drafts and one token more, their log-probabilities, and prompt ones if asked for.

    A sequence in `failed` had a NaN or infinity in its logits and gained nothing.
    """

    token_ids: dict[Sequence, list[int]] = field(default_factory=dict)
    logprobs: dict[Sequence, list[TokenLogprob]] = field(default_factory=dict)
    prompt_logprobs: dict[Sequence, list[TokenLogprob]] = field(default_factory=dict)
    failed: set[Sequence] = field(default_factory=set)


class Runner:
    """Owns the KV tensors and, per slot, the block table as a row of one array (only new blocks are copied)."""

    def __init__(self, model: Decoder, cache: KVCache, max_num_seqs: int, max_model_len: int) -> None:
        self.model = model
        self.cache = cache
        self._device = model.device
        self._is_cpu = self._device.type == "cpu"
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // cache.block_size) + 1), dtype=np.int64)

    def execute(self, plan: Plan) -> StepResult:
        """Run one step. Single-token chunks go first, as the attention op wants them."""
        chunks = sorted(plan.chunks, key=lambda chunk: chunk.count != 1)
        token_ids, step = self._inputs(chunks)
        hidden = self.model.forward(token_ids, step, self.cache)
        result = StepResult()
        self._prompt_logprobs(chunks, hidden, result)
        self._sample(chunks, hidden, result)
        return result

    def _inputs(self, chunks: ListLike[Chunk]) -> tuple[torch.Tensor, AttentionStep]:
        block_size = self.cache.block_size
        token_ids: list[int] = []
        slots: list[int] = []
        query_lens: list[int] = []
        context_lens: list[int] = []
        for chunk in chunks:
            sequence, stop = chunk.sequence, chunk.start + chunk.count
            known = sequence.token_ids[chunk.start : stop]
            token_ids += known
            missing = chunk.count - len(known)
            token_ids += chunk.drafts[:missing]
            token_ids += [0] * (missing - len(chunk.drafts))  # pending: known to the device only
            # the blocks of what is computed are in the array since the step that computed it
            first = 0 if chunk.is_new else -(-chunk.start // block_size)
            if new := sequence.block_table[first:]:
                self._tables[sequence.slot, first : first + len(new)] = new
            slots.append(sequence.slot)
            query_lens.append(chunk.count)
            context_lens.append(stop)
        width = -(-max(context_lens) // block_size)
        # a step's weights push everything else out of the caches: what is called seldom costs tens of microseconds
        is_one = len(slots) == 1
        tables = self._tables[slots[0] : slots[0] + 1, :width] if is_one else self._tables[slots, :width]
        step = AttentionStep(query_lens, context_lens, tables, block_size, self._device)
        return self._tensor(token_ids), step

    def _tensor(self, values: list[int]) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(values, dtype=np.int64))
        return tensor if self._is_cpu else tensor.to(self._device, non_blocking=True)

    def _sample(self, chunks: ListLike[Chunk], hidden: torch.Tensor, result: StepResult) -> None:
        """Logits only for the rows that give tokens: each sampling chunk's last known token and its drafts."""
        sampling: list[Chunk] = []
        index: list[int] = []
        rows: list[Row] = []
        end = 0
        for chunk in chunks:
            end += chunk.count
            if not chunk.samples:
                continue
            if len(chunk.sequence.token_ids) >= chunk.sequence.max_length:
                result.token_ids[chunk.sequence] = []  # max_tokens 0: only the prompt was wanted
                continue
            sampling.append(chunk)
            index.extend(range(end - 1 - len(chunk.drafts), end))
            rows.extend(_rows(chunk))
        if not rows:
            return
        tokens: list[int | None] = [None] * len(rows)
        hidden = self._take(hidden, index, end)
        rest = self._draw_from_top(hidden, rows, tokens)
        entries = self._draw_from_all(hidden, rows, rest, tokens) if rest else {}
        for sequence, at in _verify(sampling, tokens, result):
            if at in entries:
                result.logprobs.setdefault(sequence, []).append(entries[at])

    def _take(self, hidden: torch.Tensor, index: list[int], num_rows: int) -> torch.Tensor:
        """The rows `index`, which ascend, of hidden [num_rows, hidden]."""
        return hidden if len(index) == num_rows else hidden.index_select(0, self._tensor(index))

    def _draw_from_top(self, hidden: torch.Tensor, rows: ListLike[Row], tokens: list[int | None]) -> list[int]:
        """Fill in the tokens of the rows that their largest logits decide; returns the numbers of the others.

        Each row is looked at by itself, so that the way it takes, and its token, do not depend on the batch.
        """
        wanted = [num_candidates(row) for row in rows]
        short = [at for at, count in enumerate(wanted) if count is not None]
        if not short:
            return list(range(len(rows)))
        k = min(max(count for count in wanted if count is not None), self.model.config.vocab_size)
        top = self.model.top_logits(self._take(hidden, short, len(rows)), k)
        found, again = sample_top(*top, [rows[at] for at in short])
        for at, token in zip(short, found, strict=True):
            tokens[at] = token
        undecided = {short[at] for at in again}
        return [at for at, count in enumerate(wanted) if count is None or at in undecided]

    def _draw_from_all(
        self, hidden: torch.Tensor, rows: ListLike[Row], numbers: list[int], tokens: list[int | None]
    ) -> dict[int, TokenLogprob]:
        """Fill in the tokens of the rows `numbers`; returns the log-probabilities of those that ask, by number."""
        logits = self.model.logits(self._take(hidden, numbers, len(rows)))
        asks = [place for place, at in enumerate(numbers) if rows[at].sampling.logprobs is not None]
        raw = logits[asks]
        drawn = sample(logits, [rows[at] for at in numbers])
        for at, token in zip(numbers, drawn, strict=True):
            tokens[at] = token
        if not asks:
            return {}
        counts = [rows[numbers[place]].sampling.logprobs or 0 for place in asks]
        entries = logprobs_of(raw, [drawn[place] or 0 for place in asks], counts)
        return {numbers[place]: entry for place, entry in zip(asks, entries, strict=True)}

    def _prompt_logprobs(self, chunks: ListLike[Chunk], hidden: torch.Tensor, result: StepResult) -> None:
        """For each prompt position in the step but the last: how likely the prompt's next token was."""
        first = 0
        for chunk in chunks:
            sequence = chunk.sequence
            count = sequence.request.sampling.prompt_logprobs
            stop = min(chunk.start + chunk.count, sequence.num_prompt - 1)
            if count is not None and chunk.start < stop:
                entries: list[TokenLogprob] = []
                for start in range(chunk.start, stop, _PROMPT_LOGIT_ROWS):
                    end = min(start + _PROMPT_LOGIT_ROWS, stop)
                    offset = first - chunk.start
                    logits = self.model.logits(hidden[start + offset : end + offset])
                    entries += logprobs_of(logits, sequence.token_ids[start + 1 : end + 1], [count] * (end - start))
                result.prompt_logprobs[sequence] = entries
            first += chunk.count


def _rows(chunk: Chunk) -> list[Row]:
    sequence, request = chunk.sequence, chunk.sequence.request
    rest = (sequence.num_prompt, request.eos_token_ids, sequence.seed, sequence.index)
    rows = [Row(request.sampling, sequence.token_ids, *rest)]
    for at in range(1, len(chunk.drafts) + 1):
        rows.append(Row(request.sampling, [*sequence.token_ids, *chunk.drafts[:at]], *rest))
    return rows


def _verify(sampling: ListLike[Chunk], tokens: ListLike[int | None], result: StepResult) -> list[tuple[Sequence, int]]:
    """Accept drafts while they equal what the model draws itself; the first difference is the model's own token.

    For a proposer that names one token this is rejection sampling (Leviathan et al. 2022, arXiv 2211.17192): the
    draft is kept with its probability p, and a refused draft is replaced by a draw from p without it, renormalized.
    Using the row's own draw for both also makes speculation invisible in seeded output. Returns (sequence, row).
    """
    accepted = []
    first = 0
    for chunk in sampling:
        kept: list[int] = []
        for at in range(len(chunk.drafts) + 1):
            token = tokens[first + at]
            if token is None:
                result.failed.add(chunk.sequence)
                break
            kept.append(token)
            accepted.append((chunk.sequence, first + at))
            if at < len(chunk.drafts) and token != chunk.drafts[at]:
                break
        result.token_ids[chunk.sequence] = kept
        first += len(chunk.drafts) + 1
    return accepted
