"""The scheduler and the block pool under a hundred thousand random steps, and each rule alone. No torch here."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.config import SchedulerConfig
from powertrain.engine.blocks import BlockPool, chain_hash, root_hash
from powertrain.engine.scheduler import Plan, Scheduler, Sequence
from powertrain.types import FinishReason, PowertrainError, Request, SamplingParams

BLOCK = 4


class EchoProposer:
    """Drafts that are right about half the time: the property test needs both outcomes."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def propose(self, token_ids, max_tokens):
        return [self.rng.randrange(2) for _ in range(self.rng.randint(0, max_tokens))]


def make(num_blocks=20, seqs=4, budget=16, caching=True, proposer=None, num_drafts=0):
    pool = BlockPool(num_blocks, caching)
    return Scheduler(
        SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=budget), pool, BLOCK, proposer, num_drafts
    )


def sequence(name, prompt, max_tokens=8, salt="", index=0, leader=None, **sampling):
    request = Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        eos_token_ids=(99,),
        cache_salt=salt,
    )
    return Sequence(request, index, len(prompt) + max_tokens, list(prompt), leader=leader)


def finish(scheduler, token=7, limit=1000):
    """Run to the end with a fixed token; returns the plans."""
    plans = []
    while scheduler.has_work():
        plan = scheduler.schedule()
        assert plan.num_tokens > 0, "a step without progress"
        scheduler.commit(plan, {c.sequence: [token] for c in plan.chunks if c.samples})
        scheduler.check()
        plans.append(plan)
        assert len(plans) < limit
    return plans


class Oracle:
    """What the cache must hold: the tokens behind every block, written when a step computes them."""

    def __init__(self) -> None:
        self.content: dict[int, list[int | None]] = {}

    def execute(self, plan) -> None:
        for chunk in plan.chunks:
            seq = chunk.sequence
            ids = [*seq.token_ids, *chunk.drafts]
            for position in range(chunk.start + chunk.count):
                block, offset = seq.block_table[position // BLOCK], position % BLOCK
                cells = self.content.setdefault(block, [None] * BLOCK)
                if position >= chunk.start:
                    cells[offset] = ids[position]
                else:
                    assert cells[offset] == ids[position], "a block holds another sequence's tokens"


@pytest.mark.parametrize("seed", range(4))
def test_a_hundred_thousand_random_steps(seed):
    """Arrive, abort, finish, preempt, share, draft: no leaked or wrongly shared block, no budget overrun, progress."""
    rng = random.Random(seed)
    num_drafts = 3 if seed % 2 else 0
    num_blocks, budget = rng.randint(11, 14), rng.randint(5, 24)
    scheduler = make(num_blocks, rng.randint(2, 6), budget, seed != 2, EchoProposer(rng), num_drafts)
    oracle, serial, ended = Oracle(), 0, 0
    for _ in range(25_000):
        action = rng.random()
        if action < 0.25 and len(scheduler.waiting) < 8:
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
            max_tokens = rng.randint(0, num_blocks * BLOCK - len(prompt)) if rng.random() < 0.1 else rng.randint(0, 24)
            salt, leader = rng.choice(("", "", "tenant")), None
            for index in range(rng.choice((1, 1, 1, 3))):
                child = sequence(f"r{serial}", prompt, max_tokens, salt, index, leader)
                leader = leader or child
                scheduler.add(child)
            serial += 1
        elif action < 0.30 and serial:
            scheduler.abort(f"r{rng.randrange(serial)}", rng.choice((None, 0)))
        if not scheduler.has_work():
            assert scheduler.pool.num_in_use == 0
            continue
        plan = scheduler.schedule()
        assert 0 < plan.num_tokens <= budget
        oracle.execute(plan)
        if rng.random() < 0.03:
            scheduler.abort(rng.choice(plan.chunks).sequence.request.request_id)  # between execute and commit
        sampled = {}
        for chunk in plan.chunks:
            if chunk.samples and len(chunk.sequence.token_ids) < chunk.sequence.max_length:
                kept = rng.randint(0, len(chunk.drafts))
                sampled[chunk.sequence] = [*chunk.drafts[:kept], 99 if rng.random() < 0.05 else rng.randrange(2)]
        before = {s: len(s.token_ids) for s in sampled}
        for seq, tokens in scheduler.commit(plan, sampled).items():
            assert len(seq.token_ids) == before.get(seq, len(seq.token_ids)) + len(tokens)
            assert len(seq.token_ids) <= seq.max_length
            ended += seq.is_finished
        scheduler.check()
    assert ended > 1000
    assert scheduler.num_preemptions > 100
    finish(scheduler, limit=20_000)
    assert scheduler.pool.num_in_use == 0
    assert sorted(scheduler._free_slots) == list(range(scheduler.config.max_num_seqs))


class Device:
    """Runs plans in order, ahead of the host: it alone knows a pending token, and writes what it is told at once."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.oracle = Oracle()
        self.last: dict[int, int] = {}

    def launch(self, plan) -> dict[Sequence, list[int]]:
        sampled = {}
        for chunk in plan.chunks:
            seq = chunk.sequence
            pending = [self.last[seq.slot]] if seq.num_pending else []
            assert seq.num_pending <= 1
            known = Sequence(seq.request, 0, seq.max_length, [*seq.token_ids, *pending], block_table=seq.block_table)
            assert chunk.start + chunk.count <= len(known.token_ids)
            self.oracle.execute(Plan((replace(chunk, sequence=known),)))
            if chunk.samples and len(known.token_ids) < seq.max_length:
                self.last[seq.slot] = 99 if self.rng.random() < 0.05 else self.rng.randrange(2)
                sampled[seq] = [self.last[seq.slot]]
        return sampled


@pytest.mark.parametrize("seed", range(4))
def test_random_steps_planned_one_ahead(seed):
    """Every plan is made while the tokens of the one before are unknown: the same promises, and one wasted row each."""
    rng = random.Random(seed)
    num_blocks, budget = rng.randint(11, 14), rng.randint(5, 24)
    scheduler = make(num_blocks, rng.randint(2, 6), budget, seed != 2)
    device, in_flight, serial, ended, num_wasted = Device(rng), None, 0, 0, 0
    for _ in range(12_000):
        action = rng.random()
        if action < 0.25 and len(scheduler.waiting) < 8:
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
            leader = None
            for index in range(rng.choice((1, 1, 1, 3))):
                child = sequence(f"r{serial}", prompt, rng.randint(0, 24), rng.choice(("", "tenant")), index, leader)
                leader = leader or child
                scheduler.add(child)
            serial += 1
        elif action < 0.30 and serial:
            scheduler.abort(f"r{rng.randrange(serial)}", rng.choice((None, 0)))
        plan = scheduler.schedule()
        assert plan.num_tokens <= budget
        assert plan.chunks or in_flight or not scheduler.has_work(), "a step without progress"
        sampled = device.launch(plan)
        scheduler.advance(plan)
        if in_flight is not None:
            scheduler.commit(*in_flight, is_advanced=True)
            wasted = [chunk for chunk in plan.chunks if chunk.sequence.is_finished]
            assert all(chunk.count == 1 for chunk in wasted if chunk.sequence.num_output)
            num_wasted += len(wasted)
            ended += sum(chunk.sequence.is_finished for chunk in in_flight[0].chunks)
        scheduler.check()
        in_flight = (plan, sampled) if plan.chunks else None
    if in_flight is not None:
        scheduler.commit(*in_flight, is_advanced=True)
    assert ended > 400
    assert num_wasted > 100
    assert scheduler.num_preemptions > 50
    finish(scheduler, limit=20_000)
    assert all(seq.num_pending == 0 for seq in (*scheduler.running, *scheduler.waiting))
    assert scheduler.pool.num_in_use == 0
    assert sorted(scheduler._free_slots) == list(range(scheduler.config.max_num_seqs))


def test_no_torch_is_needed():
    import subprocess

    code = "import sys; import powertrain.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_decodes_run_before_prefill_chunks_within_one_budget():
    scheduler = make(budget=6)
    scheduler.add(sequence("a", [1] * 3))
    scheduler.commit(plan := scheduler.schedule(), {plan.chunks[0].sequence: [5]})
    scheduler.add(sequence("b", [2] * 12))
    sizes = []
    for _ in range(3):
        plan = scheduler.schedule()
        sizes.append([(c.sequence.request.request_id, c.count) for c in plan.chunks])
        scheduler.commit(plan, {c.sequence: [5] for c in plan.chunks if c.samples})
    assert sizes == [[("a", 1), ("b", 5)], [("a", 1), ("b", 5)], [("a", 1), ("b", 2)]]


def test_a_prefix_is_computed_once_and_salted_apart():
    scheduler = make()
    scheduler.add(sequence("a", range(10)))
    finish(scheduler)
    scheduler.add(sequence("b", range(10)))
    scheduler.add(sequence("c", range(10), salt="other"))
    plan = scheduler.schedule()
    assert [(c.start, c.count) for c in plan.chunks] == [(8, 2), (0, 10)]
    assert [c.sequence.num_cached for c in plan.chunks] == [8, 0]


def test_siblings_wait_for_the_prompt_they_share():
    scheduler = make()
    leader = sequence("a", range(9))
    scheduler.add(leader)
    scheduler.add(sequence("a", range(9), index=1, leader=leader))
    scheduler.add(sequence("z", [3, 3]))
    first = scheduler.schedule()
    assert [(c.sequence.request.request_id, c.sequence.index) for c in first.chunks] == [("a", 0), ("z", 0)]
    scheduler.commit(first, {c.sequence: [7] for c in first.chunks})
    second = scheduler.schedule()
    assert [(c.sequence.index, c.start) for c in second.chunks if c.sequence.request.request_id == "a"] == [
        (0, 9),
        (1, 8),
    ]


def test_a_request_for_the_whole_pool_is_not_starved_by_small_ones():
    scheduler = make(num_blocks=6, budget=64)
    for i in range(3):
        scheduler.add(sequence(f"s{i}", [i] * 4, 4))
    scheduler.schedule()
    big = sequence("big", [9] * 20, 4)
    scheduler.add(big)
    for i in range(40):
        scheduler.add(sequence(f"t{i}", [i % 90] * 4, 4))
    plans = finish(scheduler)
    order = [c.sequence.request.request_id for p in plans for c in p.chunks if c.samples and c.sequence.num_output]
    assert big.finish_reason is FinishReason.LENGTH
    assert order.index("big") < order.index("t0")


def test_a_preemption_storm_ends():
    """The pool holds little more than one request; all of 64 finish and recomputing stays bounded."""
    scheduler = make(num_blocks=7, seqs=8, budget=32, caching=False)
    for i in range(64):
        scheduler.add(sequence(f"s{i}", [i] * 8, 16))
    plans = finish(scheduler, limit=10_000)
    computed = sum(p.num_tokens for p in plans)
    assert scheduler.num_preemptions > 0
    assert computed < 4 * 64 * 24


def test_min_tokens_and_stop_ids():
    scheduler = make()
    scheduler.add(sequence("a", [1], 8, min_tokens=3, stop_token_ids=(7,)))
    plans = finish(scheduler, token=7)
    seq = plans[0].chunks[0].sequence
    assert (seq.num_output, seq.finish_reason, seq.stop_token_id) == (3, FinishReason.STOP, 7)


@settings(max_examples=200, deadline=None)
@given(
    left=st.lists(st.integers(0, 3), max_size=8),
    right=st.lists(st.integers(0, 3), max_size=8),
    salt=st.text(max_size=3),
)
def test_hash_chains_meet_only_where_everything_is_equal(left, right, salt):
    chain = chain_hash(root_hash(""), left)
    assert (chain == chain_hash(root_hash(""), right)) == (left == right)
    assert (chain == chain_hash(root_hash(salt), left)) == (salt == "")


def test_check_finds_a_leak_and_a_wrong_share():
    pool = BlockPool(4)
    block = pool.acquire()
    with pytest.raises(PowertrainError, match="count 1 but 0 users"):
        pool.check([])
    with pytest.raises(PowertrainError, match="count 1 but 2 users"):
        pool.check([[block], [block]])


def test_blocks_without_a_prefix_are_used_before_cached_ones():
    pool = BlockPool(3)
    cached, plain = pool.acquire(), pool.acquire()
    pool.publish(cached, b"h")
    pool.release([cached])
    pool.release([plain])
    assert pool.acquire() == plain
    pool.acquire()
    assert pool.find(b"h") == cached
    assert pool.acquire() == cached
    assert pool.find(b"h") is None
