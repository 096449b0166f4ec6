"""Plan to tokens on a GPU, without waiting: a step is launched, and its tokens are fetched when they are wanted.

Steps of single tokens replay a captured graph. The last token of each sequence stays on the device, so that the next
step can be launched before the host has seen it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import numpy as np
import torch

from powertrain.engine.graph import DecodeGraphs, DeviceState, RowInputs, compile_decodes, draw_next
from powertrain.engine.runner import Runner, StepResult
from powertrain.engine.sampler import Row, has_penalties, needs_host, uniform
from powertrain.engine.scheduler import Chunk, Plan, Sequence
from powertrain.model.decoder import Decoder, KVCache
from powertrain.types import SamplingParams

logger = logging.getLogger(__name__)

IN_PROMPT, MAX_COUNT = -(2**15), 2**15 - 1


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way: its sampling sequences in row order, their tokens in host memory once `done` has passed."""

    sequences: list[Sequence]
    tokens: torch.Tensor
    done: torch.cuda.Event

    def collect(self) -> StepResult:
        """Wait for the tokens."""
        self.done.synchronize()
        result = StepResult()
        for sequence, token in zip(self.sequences, self.tokens.tolist(), strict=False):
            if token < 0:
                result.failed.add(sequence)
            result.token_ids[sequence] = [token] if token >= 0 else []
        return result


class GpuRunner(Runner):
    """A `Runner` whose plain steps can be launched ahead of their results."""

    def __init__(self, model: Decoder, cache: KVCache, max_num_seqs: int, max_model_len: int) -> None:
        super().__init__(model, cache, max_num_seqs, max_model_len)
        device = model.device
        width = self._tables.shape[1]
        self._state = DeviceState.empty(max_num_seqs, width, model.config.vocab_size, device)
        # two steps may be under way, and each reads its inputs when its turn comes
        self._inputs_of = [RowInputs.empty(max_num_seqs, "cpu", pinned=device.type == "cuda") for _ in range(3)]
        self._turn = 0
        self._graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def compile(self) -> None:
        """Compile what the graphs launch, side by side; the rest is compiled when it is first used."""
        if self.model.kernels == "triton" and self.model.device.type == "cuda":
            started = time.perf_counter()
            count = compile_decodes(self.model, self.cache, self._state, self._tables.shape[0])
            if count:
                logger.info("compiled %d kernels in %.1f s", count, time.perf_counter() - started)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the decode graphs; before it, every step is launched kernel by kernel."""
        started = time.perf_counter()
        self._graphs = DecodeGraphs(self.model, self.cache, self._state, self._tables.shape[0])
        logger.info("captured %d graphs in %.1f s", len(self._graphs.sizes), time.perf_counter() - started)

    @staticmethod
    def can_launch(plan: Plan) -> bool:
        """Whether no row of the plan needs its context, its logits or a draft on the host."""
        return all(is_plain(chunk.sequence) and not chunk.drafts for chunk in plan.chunks)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Launched:
        """Start a step for which `can_launch` holds."""
        chunks = sorted(plan.chunks, key=lambda chunk: chunk.count != 1)
        sampling = [chunk for chunk in chunks if chunk.samples and not _is_full(chunk)]
        is_decode = len(sampling) == len(chunks) and all(chunk.count == 1 and not chunk.is_new for chunk in chunks)
        size = self._graphs.size_for(len(chunks)) if is_decode and self._graphs is not None else None
        if size is not None:
            assert self._graphs is not None
            tokens = self._graphs.replay(size, self._fill(chunks, size, with_blocks=True))[: len(chunks)]
        else:
            tokens = self._launch_eager(chunks, sampling)
        return self._fetch([chunk.sequence for chunk in sampling], tokens)

    def _fetch(self, sequences: list[Sequence], tokens: torch.Tensor) -> Launched:
        """Send the tokens to the host once they are there, without waiting."""
        host = torch.empty(len(sequences), dtype=torch.int64, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Launched(sequences, host, done)

    def execute(self, plan: Plan) -> StepResult:
        """Run one step and wait for it, whatever its rows need."""
        if self.can_launch(plan):
            return self.launch(plan).collect()
        self._store_blocks(plan.chunks)
        result = super().execute(plan)
        slots = [sequence.slot for sequence, tokens in result.token_ids.items() if tokens]
        last = [tokens[-1] for tokens in result.token_ids.values() if tokens]
        if slots:
            self._state.last_tokens.index_copy_(0, self._tensor(slots), self._tensor(last))
        for sequence, tokens in result.token_ids.items():
            if has_penalties(sequence.request.sampling):
                known = [*sequence.token_ids, *tokens]
                count_tokens(self._state.counts[sequence.slot], known, sequence.num_prompt)
        return result

    def _draw_from_top(self, hidden: torch.Tensor, rows: ListLike[Row], tokens: list[int | None]) -> list[int]:
        """Draw rows as a launched step does where it could, so that what shares their batch does not show."""
        needs = [needs_host(row.sampling, len(row.context) - row.num_prompt) for row in rows]
        plain = [at for at, needed in enumerate(needs) if not needed]
        if plain:
            logits = self.model.raw_logits(self._take(hidden, plain, len(rows))).contiguous()
            drawn = draw_rows(logits, [rows[at] for at in plain])
            for at, token in zip(plain, drawn, strict=True):
                tokens[at] = token
        return [at for at, needed in enumerate(needs) if needed]

    def _launch_eager(self, chunks: ListLike[Chunk], sampling: ListLike[Chunk]) -> torch.Tensor:
        self._store_blocks(chunks)
        token_ids, step = self._inputs(chunks)
        token_ids = self._with_pending(chunks, token_ids)
        hidden = self.model.forward(token_ids, step, self.cache)
        if not sampling:
            return hidden.new_empty(0, dtype=torch.int64)
        ends, end = [], 0
        for chunk in chunks:
            end += chunk.count
            if chunk.samples and not _is_full(chunk):
                ends.append(end - 1)
        rows = self._take(hidden, ends, end)
        inputs = RowInputs.empty(len(sampling), self.model.device)
        inputs.copy_from(self._fill(sampling, len(sampling), with_blocks=False))
        return draw_next(self.model, rows, self._state, inputs)

    def _with_pending(self, chunks: ListLike[Chunk], token_ids: torch.Tensor) -> torch.Tensor:
        """The step's token ids with those filled in that only the device knows yet."""
        at, slots, row = [], [], 0
        for chunk in chunks:
            if chunk.start + chunk.count > len(chunk.sequence.token_ids):
                at.append(row + chunk.count - 1)
                slots.append(chunk.sequence.slot)
            row += chunk.count
        if not at:
            return token_ids
        known = self._state.last_tokens.index_select(0, self._tensor(slots)).clamp_(min=0)
        return token_ids.index_copy_(0, self._tensor(at), known)

    def _store_blocks(self, chunks: ListLike[Chunk]) -> None:
        """Put the chunks' new blocks in the device's tables, and count the tokens of new sequences with penalties."""
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for chunk in chunks:
            sequence = chunk.sequence
            if chunk.is_new and has_penalties(sequence.request.sampling):
                count_tokens(self._state.counts[sequence.slot], sequence.token_ids, sequence.num_prompt)
            first = 0 if chunk.is_new else -(-chunk.start // self.cache.block_size)
            new = sequence.block_table[first:]
            rows += [sequence.slot] * len(new)
            columns += range(first, first + len(new))
            blocks += new
        if blocks:
            self._state.tables.index_put_((self._tensor(rows), self._tensor(columns)), self._tensor(blocks))

    def _fill(self, chunks: ListLike[Chunk], size: int, *, with_blocks: bool) -> RowInputs:
        """The chunks' rows, then padding, in one of the pinned buffers."""
        buffer = self._inputs_of[self._turn]
        self._turn = (self._turn + 1) % len(self._inputs_of)
        inputs = buffer.first(size)
        integers, floats = inputs.integers.numpy(), inputs.floats.numpy()
        integers[:, len(chunks) :] = [[self._state.padding_slot], [0], [-1], [0]]
        floats[:, len(chunks) :] = [[value] for value in NO_DRAW]
        rows = []
        settings = []
        for chunk in chunks:
            sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
            stop = chunk.start + chunk.count
            at, place = divmod(chunk.start, self.cache.block_size)
            # only the block that begins with this token: rejected drafts may have left the next one behind it
            new = sequence.block_table[at] if with_blocks and place == 0 else -1
            if new >= 0:
                self._tables[sequence.slot, at] = new
            rows.append((sequence.slot, stop, new, sampling.top_k))
            settings.append(_draw_settings(sampling, sequence.seed, sequence.index, stop))
        integers[:, : len(chunks)] = list(zip(*rows, strict=True))
        floats[:, : len(chunks)] = list(zip(*settings, strict=True))
        return inputs


NO_DRAW = (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
"""`RowInputs.floats` of a row that takes its largest logit."""


def draw_rows(logits: torch.Tensor, rows: ListLike[Row]) -> list[int | None]:
    """A token for each row of contiguous logits [rows, vocab]; None where a row holds a NaN or infinity."""
    from powertrain.kernels.gpu.sampling import Draws, Seen, draw_tokens

    device = logits.device
    floats = [_draw_settings(row.sampling, row.seed, row.index, len(row.context)) for row in rows]
    top_k = torch.tensor([row.sampling.top_k for row in rows], device=device)
    temperature, number, top_p, min_p, *penalties = torch.tensor(floats, device=device).t().contiguous().unbind()
    penalized = [at for at, row in enumerate(rows) if has_penalties(row.sampling)]
    counts = torch.zeros(len(penalized) + 1, logits.shape[1], dtype=torch.int16, device=device)
    slots = [0] * len(rows)  # the others share one that is not read
    for slot, at in enumerate(penalized, start=1):
        slots[at] = slot
        count_tokens(counts[slot], rows[at].context, rows[at].num_prompt)
    seen = Seen(counts, torch.tensor(slots, device=device))
    tokens = draw_tokens(logits, Draws(temperature, number, top_p, min_p, top_k, *penalties), seen).tolist()
    return [token if token >= 0 else None for token in tokens]


def count_tokens(counts: torch.Tensor, token_ids: ListLike[int], num_prompt: int) -> None:
    """Fill counts, int16 [vocab], with what a sequence holds (`kernels.gpu.sampling.Seen`)."""
    counts.zero_()
    counts.index_fill_(0, torch.tensor(token_ids[:num_prompt], dtype=torch.int64).to(counts.device), IN_PROMPT)
    if len(token_ids) > num_prompt:
        ids, times = np.unique(np.array(token_ids[num_prompt:], dtype=np.int64), return_counts=True)
        place = torch.from_numpy(ids).to(counts.device)
        added = torch.from_numpy(np.minimum(times, MAX_COUNT).astype(np.int16)).to(counts.device)
        counts.index_copy_(0, place, counts.index_select(0, place) + added)


def _draw_settings(sampling: SamplingParams, seed: int, index: int, position: int) -> tuple[float, ...]:
    """`RowInputs.floats` of the draw at `position`."""
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    if sampling.is_greedy:
        return 0.0, 0.0, 1.0, 0.0, *penalties
    number = uniform(seed, index, position)
    return max(sampling.temperature, 1e-5), number, sampling.top_p, sampling.min_p, *penalties


def _is_full(chunk: Chunk) -> bool:
    """Whether the sequence wants no token at all: max_tokens 0."""
    return len(chunk.sequence.token_ids) >= chunk.sequence.max_length


def is_plain(sequence: Sequence) -> bool:
    """Whether a step can give the sequence's next token without the host seeing its logits or its last token."""
    sampling = sequence.request.sampling
    return sampling.prompt_logprobs is None and not needs_host(sampling, sequence.num_output)
