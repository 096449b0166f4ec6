"""One law: a sequence has tokens known and tokens computed; a step spends a token budget closing the gaps.

Chunked prefill (Sarathi-Serve, Agrawal et al. 2024, arXiv 2403.02310), prefix hits, preemption by recomputation and
draft verification are all the same subtraction. `schedule` decides and returns a value, `commit` books what came of
it. No torch here: the property tests run this by the hundred thousand steps.
"""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass, field
from typing import Protocol

from powertrain.config import SchedulerConfig
from powertrain.engine.blocks import BlockHash, BlockPool, chain_hash, root_hash
from powertrain.types import FinishReason, Request


class Proposer(Protocol):
    """Guesses the next tokens of a sequence. Wrong guesses cost time, never correctness."""

    def propose(self, token_ids: abc.Sequence[int], max_tokens: int) -> list[int]: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """One of a request's n continuations, from arrival to its last token. `slot` is -1 while it is not running.

    `num_pending` of its tokens, beyond `token_ids`, are being computed: known to the device only.
    """

    request: Request
    index: int
    max_length: int
    token_ids: list[int]
    seed: int = 0
    num_computed: int = 0
    num_pending: int = 0
    num_published: int = 0
    drafts: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    hashes: list[BlockHash] = field(default_factory=list)
    slot: int = -1
    num_cached: int | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    leader: Sequence | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Tokens that there are, here or on the device."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None

    @property
    def waits_for_leader(self) -> bool:
        """Whether a sibling is about to compute the prompt they share."""
        leader = self.leader
        return leader is not None and not leader.is_finished and leader.num_computed < leader.num_prompt


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of one sequence from position `start` on: known ones, then `drafts`.

    `samples` tells that the chunk reaches the last known token, so that its logits give new ones; `is_new` that the
    sequence was admitted in this step and its whole block table is news to the runner.
    """

    sequence: Sequence
    start: int
    count: int
    drafts: tuple[int, ...]
    samples: bool
    is_new: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step computes."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


class Scheduler:
    """Waiting and running sequences over one block pool and one set of slots."""

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, block_size: int, proposer: Proposer | None, num_drafts: int = 0
    ) -> None:
        self.config = config
        self.pool = pool
        self.block_size = block_size
        self.proposer = proposer
        self.num_drafts = num_drafts
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def abort(self, request_id: str, index: int | None = None) -> list[Sequence]:
        """End the sequences of a request, waiting or running, at once. Returns those that were alive."""
        ended = [
            sequence
            for sequence in (*self.running, *self.waiting)
            if sequence.request.request_id == request_id and index in (None, sequence.index)
        ]
        self.end(ended, FinishReason.ABORT)
        return ended

    def end(self, sequences: abc.Iterable[Sequence], reason: FinishReason) -> None:
        """Finish live sequences and give back all they hold."""
        for sequence in sequences:
            sequence.finish_reason = reason
            self._remove(sequence)

    def _remove(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    # -- decide ------------------------------------------------------------------------------------------------

    def schedule(self) -> Plan:
        """Running sequences first, oldest first; then waiting ones while budget, slots and blocks last."""
        budget = self.config.max_num_batched_tokens
        chunks: list[Chunk] = []
        num_preempted = self.num_preemptions
        position = 0
        while position < len(self.running) and budget > 0:
            sequence = self.running[position]
            if sequence.num_pending and sequence.num_known >= sequence.max_length:
                position += 1  # its last token is under way
                continue
            chunk = self._extend(sequence, budget)
            if chunk is None:
                continue  # somebody at the tail was preempted, perhaps this one: look at the same position again
            chunks.append(chunk)
            budget -= chunk.count
            position += 1
        if self.num_preemptions == num_preempted:
            self._admit(chunks, budget)
        return Plan(tuple(chunks))

    def _extend(self, sequence: Sequence, budget: int) -> Chunk | None:
        """The next chunk of a running sequence, or None after preempting the youngest one for its blocks."""
        num_known = sequence.num_known
        gap = num_known - sequence.num_computed
        sequence.drafts = self._draft(sequence, budget - gap) if gap == 1 else []
        count = min(gap + len(sequence.drafts), budget)
        missing = self._num_missing_blocks(sequence, sequence.num_computed + count)
        if missing > self.pool.num_free and sequence.drafts:
            sequence.drafts, count = [], gap
            missing = self._num_missing_blocks(sequence, num_known)
        if missing > self.pool.num_free:
            self._preempt(self.running[-1])
            return None
        if missing:
            sequence.block_table.extend(self.pool.acquire() for _ in range(missing))
        return self._chunk(sequence, count, is_new=False)

    def _draft(self, sequence: Sequence, room: int) -> list[int]:
        if self.proposer is None:
            return []
        room = min(room, self.num_drafts, sequence.max_length - len(sequence.token_ids) - 1)
        return self.proposer.propose(sequence.token_ids, room)[:room] if room > 0 else []

    def _chunk(self, sequence: Sequence, count: int, *, is_new: bool) -> Chunk:
        reaches_end = sequence.num_computed + count >= sequence.num_known
        return Chunk(sequence, sequence.num_computed, count, tuple(sequence.drafts), reaches_end, is_new)

    def _num_missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        return max(0, -(-num_tokens // self.block_size) - len(sequence.block_table))

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a sequence; it will recompute, mostly out of the prefix cache."""
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Admit in order of arrival. The head of the line is never overtaken for want of blocks: no starvation."""
        held_back: list[Sequence] = []
        while self.waiting and budget > 0 and self._free_slots:
            sequence = self.waiting[0]
            if sequence.num_pending:
                break  # preempted while a token of its own is under way: it starts over once that is known
            if sequence.waits_for_leader and self.pool.is_caching:
                held_back.append(self.waiting.popleft())
                continue
            cached = self._cached_prefix(sequence)
            num_revived = sum(self.pool.is_free(block) for block in cached)
            # blocks for all known tokens, not just the first chunk: half-done prompts must not evict each other
            missing = -(-len(sequence.token_ids) // self.block_size) - len(cached)
            if missing > self.pool.num_free - num_revived:
                break
            self.waiting.popleft()
            self._start(sequence, cached)
            count = min(len(sequence.token_ids) - sequence.num_computed, budget)
            extra = self._num_missing_blocks(sequence, sequence.num_computed + count)
            sequence.block_table.extend(self.pool.acquire() for _ in range(extra))
            sequence.drafts = []
            chunks.append(self._chunk(sequence, count, is_new=True))
            budget -= count
        self.waiting.extendleft(reversed(held_back))

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the sequence's leading tokens; at least one token is always left to compute."""
        if not self.pool.is_caching or sequence.wants_prompt_logprobs:
            return []
        blocks = []
        for at in range((len(sequence.token_ids) - 1) // self.block_size):
            block = self.pool.find(self._hash(sequence, at))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _hash(self, sequence: Sequence, at: int) -> BlockHash:
        """Hash of the sequence's block number `at`, all of whose tokens are known."""
        while len(sequence.hashes) <= at:
            done = len(sequence.hashes)
            parent = sequence.hashes[-1] if done else root_hash(sequence.request.cache_salt)
            tokens = sequence.token_ids[done * self.block_size : (done + 1) * self.block_size]
            sequence.hashes.append(chain_hash(parent, tokens))
        return sequence.hashes[at]

    def _start(self, sequence: Sequence, cached: list[int]) -> None:
        for block in cached:
            self.pool.share(block)
        sequence.block_table = cached
        sequence.num_computed = len(cached) * self.block_size
        sequence.num_published = len(cached)
        sequence.slot = self._free_slots.pop()
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            self.prefix_queries += len(sequence.token_ids)
            self.prefix_hits += sequence.num_computed
        self.running.append(sequence)

    # -- commit ------------------------------------------------------------------------------------------------

    def advance(self, plan: Plan) -> None:
        """Take a plan without drafts for computed before it is, so that the next can be made: its tokens are pending.

        A pending token may turn out to end its sequence; then what the next plan computes of it is wasted, one row.
        """
        for chunk in plan.chunks:
            chunk.sequence.num_computed += chunk.count
            chunk.sequence.num_pending += chunk.samples

    def commit(
        self, plan: Plan, sampled: abc.Mapping[Sequence, abc.Sequence[int]], *, is_advanced: bool = False
    ) -> dict[Sequence, list[int]]:
        """Book a step: `sampled` holds, per sequence whose chunk samples, the accepted drafts and one token more.

        Returns the tokens each sequence really gained (cut at its end). Sequences ended meanwhile are skipped.
        `is_advanced` tells that `advance` has booked the plan's progress already.
        """
        gained: dict[Sequence, list[int]] = {}
        for chunk in plan.chunks:
            if is_advanced:
                chunk.sequence.num_pending -= chunk.samples
            if not chunk.sequence.is_finished:
                self._book(chunk, list(sampled.get(chunk.sequence, ())), gained, is_advanced=is_advanced)
        return gained

    def _book(self, chunk: Chunk, new: list[int], gained: dict[Sequence, list[int]], *, is_advanced: bool) -> None:
        sequence = chunk.sequence
        if not is_advanced:
            num_rejected = len(chunk.drafts) - max(0, len(new) - 1)
            sequence.num_computed += chunk.count - num_rejected
        if chunk.samples:
            gained[sequence] = self._append(sequence, new)
        sequence.drafts = []
        self._publish(sequence)
        if sequence.is_finished:
            self._remove(sequence)

    def _append(self, sequence: Sequence, new: abc.Sequence[int]) -> list[int]:
        """Add new tokens up to the one that ends the sequence, and set its finish reason if one does."""
        sampling, kept = sequence.request.sampling, []
        for token_id in new:
            sequence.token_ids.append(token_id)
            kept.append(token_id)
            if sequence.num_output >= sampling.min_tokens and self._stops(sequence, token_id):
                sequence.finish_reason, sequence.stop_token_id = FinishReason.STOP, token_id
                break
            if len(sequence.token_ids) >= sequence.max_length:
                break
        if not sequence.is_finished and len(sequence.token_ids) >= sequence.max_length:
            sequence.finish_reason = FinishReason.LENGTH
        return kept

    @staticmethod
    def _stops(sequence: Sequence, token_id: int) -> bool:
        sampling = sequence.request.sampling
        is_eos = token_id in sequence.request.eos_token_ids and not sampling.ignore_eos
        return is_eos or token_id in sampling.stop_token_ids

    def _publish(self, sequence: Sequence) -> None:
        """Make blocks findable whose tokens are all known and computed."""
        if not self.pool.is_caching:
            return
        num_full = min(sequence.num_computed, len(sequence.token_ids)) // self.block_size
        for at in range(sequence.num_published, num_full):
            self.pool.publish(sequence.block_table[at], self._hash(sequence, at))
        sequence.num_published = max(sequence.num_published, num_full)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.drafts = []
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
            sequence.slot = -1

    def check(self) -> None:
        """Every invariant that must hold between steps; raises `PowertrainError` on the first broken one."""
        self.pool.check([sequence.block_table for sequence in self.running])
