"""The routing policy on a simulated clock: balance, hit rate, bounds."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.serve.replica_health import read_progress
from powertrain.serve.routing import PromptWork, RoutingConfig, RoutingPolicy, prompt_work
from powertrain.types import PowertrainError

CONFIG = RoutingConfig()


def policy(num_replicas: int, config: RoutingConfig = CONFIG) -> RoutingPolicy:
    made = RoutingPolicy([f"http://r{i}" for i in range(num_replicas)], config)
    for replica in made.replicas:
        replica.is_healthy = True
    return made


class Cache:
    """A replica's real prefix cache, chunk by chunk, least recently used out first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.chunks: OrderedDict[bytes, None] = OrderedDict()

    def serve(self, work: PromptWork) -> int:
        hits = 0
        for chunk in work.hashes:
            if chunk not in self.chunks:
                break
            hits += 1
        for chunk in reversed(work.hashes):
            self.chunks[chunk] = None
            self.chunks.move_to_end(chunk)
        while len(self.chunks) > self.size:
            self.chunks.popitem(last=False)
        return hits


def conversations(num: int, turns: int, seed: int) -> list[PromptWork]:
    """Chats that all start with the same system message and grow turn by turn, interleaved at random."""
    rng = random.Random(seed)
    system = "You are a helpful assistant. " * 20
    histories = [[{"role": "system", "content": system}] for _ in range(num)]
    order = [i for i in range(num) for _ in range(turns)]
    rng.shuffle(order)
    works = []
    for i in order:
        text = "".join(rng.choices("abcdefgh ", k=rng.randint(100, 1500)))
        histories[i].append({"role": "user", "content": text})
        works.append(prompt_work({"messages": histories[i]}, CONFIG))
    return works


def simulate(works: list[PromptWork], num_replicas: int, *, round_robin: bool) -> tuple[float, float]:
    """(hit rate, most work on one replica over the mean) with 20 requests a second, each in flight for 2 s."""
    caches = [Cache(20_000) for _ in range(num_replicas)]
    uncached = [0.0] * num_replicas
    router = policy(num_replicas)
    active = []
    hits = total = 0
    for number, work in enumerate(works):
        now = number / 20
        while active and active[0][0] <= now:
            router.finish(active.pop(0)[1])
        if round_robin:
            index = number % num_replicas
        else:
            decision = router.choose(work, now)
            assert decision is not None
            router.start(decision, work, now)
            active.append((now + 2, decision))
            index = router.replicas.index(decision.replica)
        got = caches[index].serve(work)
        hits, total = hits + got, total + work.num_chunks
        uncached[index] += work.num_chunks - got
    return hits / total, max(uncached) / (sum(uncached) / num_replicas)


def test_a_prefix_that_all_share_does_not_pile_up_on_one_replica() -> None:
    works = conversations(num=200, turns=8, seed=1)
    hit_rate, imbalance = simulate(works, 4, round_robin=False)
    blind_hit_rate, _ = simulate(works, 4, round_robin=True)
    whole_hit_rate, _ = simulate(works, 1, round_robin=True)
    assert imbalance <= 1.1
    assert hit_rate >= 0.9 * whole_hit_rate
    assert hit_rate >= 1.3 * blind_hit_rate


def test_the_longest_prefix_alone_would_pile_up() -> None:
    """The test above bites: without the load terms the first replica gets everything."""
    router = policy(4, RoutingConfig(recent_work_weight=0.0, active_request_cost=0.0))
    works = conversations(num=50, turns=4, seed=2)
    for number, work in enumerate(works):
        decision = router.choose(work, number / 20)
        assert decision is not None
        router.start(decision, work, number / 20)
    counts = sorted(replica.num_active for replica in router.replicas)
    assert counts == [0, 0, 0, len(works)]


def test_a_conversation_stays_where_its_history_is() -> None:
    router = policy(3)
    messages = [{"role": "user", "content": "tell me a story " * 40}]
    homes = set()
    for turn in range(6):
        work = prompt_work({"messages": messages}, CONFIG)
        decision = router.choose(work, turn * 30.0)
        assert decision is not None
        router.start(decision, work, turn * 30.0)
        router.finish(decision)
        homes.add(decision.replica.url)
        messages.append({"role": "assistant", "content": f"chapter {turn} " * 40})
    assert len(homes) == 1


def test_unhealthy_and_excluded_replicas_get_nothing() -> None:
    router = policy(3)
    router.replicas[0].is_healthy = False
    for now in range(20):
        decision = router.choose(PromptWork(), now, exclude={"http://r1"})
        assert decision is not None
        assert decision.replica.url == "http://r2"
        router.start(decision, PromptWork(), now)
    assert router.choose(PromptWork(), 99.0, exclude={"http://r1", "http://r2"}) is None


def test_equal_prompts_without_prefix_are_spread_evenly() -> None:
    router = policy(4)
    for now in range(100):
        decision = router.choose(PromptWork((), 3), now)
        assert decision is not None
        router.start(decision, PromptWork((), 3), now)
    assert {replica.num_active for replica in router.replicas} == {25}


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.booleans()), max_size=60))
def test_books_balance_and_memory_is_bounded(steps: list[tuple[int, int, bool]]) -> None:
    router = policy(3, RoutingConfig(max_chunks_per_replica=20))
    open_requests = []
    for now, (start, length, finish) in enumerate(steps):
        work = PromptWork(tuple(bytes([start, i]) for i in range(length)), length)
        decision = router.choose(work, float(now))
        assert decision is not None
        assert 0 <= decision.num_cached <= length
        router.start(decision, work, float(now))
        open_requests.append(decision)
        if finish:
            router.finish(open_requests.pop(0))
        assert all(len(replica.chunks) <= 20 for replica in router.replicas)
        assert sum(replica.num_active for replica in router.replicas) == len(open_requests)
    for decision in open_requests:
        router.finish(decision)
    assert all(replica.num_active == 0 for replica in router.replicas)


def test_chunk_hashes_share_exactly_the_common_prefix() -> None:
    size = CONFIG.chunk_bytes
    first = prompt_work({"prompt": "a" * size * 3 + "b" * size}, CONFIG)
    second = prompt_work({"prompt": "a" * size * 3 + "c" * size * 2}, CONFIG)
    assert [x == y for x, y in zip(first.hashes, second.hashes, strict=False)] == [True, True, True, False]
    assert (first.num_chunks, second.num_chunks) == (4, 5)
    salted = prompt_work({"prompt": "a" * size * 3, "cache_salt": "tenant"}, CONFIG)
    assert salted.hashes[0] != first.hashes[0]


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        "text",
        {},
        {"prompt": None},
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": [1, 2, 2**70]},
        {"prompt": [1, "x"]},
        {"prompt": "\ud800"},
        {"messages": [1, None, {"content": [{"type": "text"}]}]},
        {"messages": "x", "prompt": {"a": 1}},
    ],
)
def test_any_json_has_a_size(body: object) -> None:
    assert prompt_work(body, CONFIG).num_chunks >= 1


def test_hashes_per_prompt_are_bounded() -> None:
    work = prompt_work({"prompt": "x" * 10_000}, RoutingConfig(max_chunks_per_prompt=8))
    assert len(work.hashes) == 8
    assert work.num_chunks == 79


def test_progress_is_read_from_a_metrics_page() -> None:
    page = (
        'vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_waiting 1.0\n'
        "vllm:prompt_tokens_total 10.0\nvllm:generation_tokens_total 5.0\nother 9\n"
    )
    assert read_progress(page) == (3.0, 15.0)
    assert read_progress("other 9\n") is None
    assert read_progress("vllm:num_requests_running nonsense\n") is None


def test_replicas_must_be_given_once() -> None:
    with pytest.raises(PowertrainError, match="at least one"):
        RoutingPolicy([])
    with pytest.raises(PowertrainError, match="twice"):
        RoutingPolicy(["http://a", "http://a"])
