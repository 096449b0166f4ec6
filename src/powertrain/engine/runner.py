"""Plan to tokens: builds the step's inputs, runs the decoder, samples, verifies drafts. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

import numpy as np
import torch

from powertrain.engine.sampler import Row, logprobs_of, sample
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
        positions = np.concatenate([np.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks])
        slots = np.repeat([chunk.sequence.slot for chunk in chunks], [chunk.count for chunk in chunks])
        num_blocks = 1
        for chunk in chunks:
            sequence = chunk.sequence
            known = sequence.token_ids[chunk.start : chunk.start + chunk.count]
            token_ids.extend(known)
            token_ids.extend(chunk.drafts[: chunk.count - len(known)])
            table = sequence.block_table
            first = 0 if chunk.is_new else chunk.start // block_size
            self._tables[sequence.slot, first : len(table)] = table[first:]
            num_blocks = max(num_blocks, -(-(chunk.start + chunk.count) // block_size))
        places = self._tables[slots, positions // block_size] * block_size + positions % block_size
        context_lens = [chunk.start + chunk.count for chunk in chunks]
        num_decodes = sum(chunk.count == 1 for chunk in chunks)
        step = AttentionStep(
            positions=self._tensor(positions),
            slots=self._tensor(places),
            query_lens=[chunk.count for chunk in chunks],
            context_lens=context_lens,
            block_tables=self._tensor(self._tables[[chunk.sequence.slot for chunk in chunks], :num_blocks]),
            context_lens_tensor=self._tensor(np.asarray(context_lens[:num_decodes], dtype=np.int64)),
            num_decodes=num_decodes,
        )
        return self._tensor(np.asarray(token_ids, dtype=np.int64)), step

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.model.device, non_blocking=True)

    def _sample(self, chunks: ListLike[Chunk], hidden: torch.Tensor, result: StepResult) -> None:
        """Logits only for the rows that give tokens: each sampling chunk's last known token and its drafts."""
        ends = np.cumsum([chunk.count for chunk in chunks])
        sampling: list[Chunk] = []
        index: list[int] = []
        rows: list[Row] = []
        for chunk, end in zip(chunks, ends, strict=True):
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
        logits = self.model.logits(hidden[self._tensor(np.asarray(index))])
        wants = [row.sampling.logprobs for row in rows]
        raw = logits.clone() if any(want is not None for want in wants) else logits
        tokens = sample(logits, rows)
        accepted_rows = _verify(sampling, tokens, result)
        self._logprobs(accepted_rows, raw, wants, result)

    @staticmethod
    def _logprobs(
        accepted: list[tuple[Sequence, int, int]], raw: torch.Tensor, wants: list[int | None], result: StepResult
    ) -> None:
        asked = [(sequence, row, token) for sequence, row, token in accepted if wants[row] is not None]
        if not asked:
            return
        counts = [wants[row] or 0 for _, row, _ in asked]
        entries = logprobs_of(raw[[row for _, row, _ in asked]], [token for _, _, token in asked], counts)
        for (sequence, _, _), entry in zip(asked, entries, strict=True):
            result.logprobs.setdefault(sequence, []).append(entry)

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
    sequence = chunk.sequence
    contexts: list[ListLike[int]] = [sequence.token_ids]
    contexts += [[*sequence.token_ids, *chunk.drafts[:at]] for at in range(1, len(chunk.drafts) + 1)]
    request = sequence.request
    return [
        Row(request.sampling, context, sequence.num_prompt, request.eos_token_ids, sequence.seed, sequence.index)
        for context in contexts
    ]


def _verify(
    sampling: ListLike[Chunk], tokens: ListLike[int | None], result: StepResult
) -> list[tuple[Sequence, int, int]]:
    """Accept drafts while they equal what the model draws itself; the first difference is the model's own token.

    For a proposer that names one token this is rejection sampling (Leviathan et al. 2022, arXiv 2211.17192): the
    draft is kept with its probability p, and a refused draft is replaced by a draw from p without it, renormalized.
    Using the row's own draw for both also makes speculation invisible in seeded output. Returns (sequence, row, token).
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
            accepted.append((chunk.sequence, first + at, token))
            if at < len(chunk.drafts) and token != chunk.drafts[at]:
                break
        result.token_ids[chunk.sequence] = kept
        first += len(chunk.drafts) + 1
    return accepted
