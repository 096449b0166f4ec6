"""Native paged attention against the formula in float64, for every type of cache; its bits never depend on company."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from native_builders import (
    LEVELS,
    NATIVE,
    each_level,
    generator,
    needs_native,
    relative_error,
    to_int8,
)
from powertrain.kernels.attention import AttentionStep
from powertrain.kernels.attention import paged_attention as torch_attention
from powertrain.kernels.attention import write_kv as torch_write_kv
from powertrain.kernels.cases import AttentionCase, attention_cases

pytestmark = needs_native

KV_TYPES = ("float32", "float16", "int8")
each_kv_type = pytest.mark.parametrize("kv_type", KV_TYPES)


def team_of(threads: int, level: str) -> Any:
    return NATIVE.Team(threads, level)


def lengths(values: Sequence[int]) -> Any:
    return np.array(values, dtype=np.int32)


@dataclass
class Paged:
    """Sequences whose keys and values [context, kv_heads, dim] lie in scattered blocks of a native cache.

    The cache is filled with garbage first, in two layers, of which the first is never used.
    """

    kv_type: str
    block_size: int
    keys: list[Tensor]
    values: list[Tensor]
    seed: int = 0
    cache: Any = field(init=False)
    memory: Any = field(init=False)
    tables: Any = field(init=False)

    def __post_init__(self) -> None:
        _, kv_heads, dim = self.keys[0].shape
        widths = [-(-len(keys) // self.block_size) for keys in self.keys]
        num_blocks = sum(widths) + 2
        order = torch.randperm(num_blocks, generator=generator(self.seed)).tolist()
        self.tables = np.full((len(widths), max(widths) + 1), -1, dtype=np.int64)  # unused entries are never read
        for row, width in enumerate(widths):
            self.tables[row, :width] = [order.pop() for _ in range(width)]
        num_bytes = 2 * num_blocks * NATIVE.Cache.bytes_per_block(self.kv_type, self.block_size, kv_heads, dim)
        self.memory = np.full(num_bytes, 0xFF, dtype=np.uint8)  # NaN in every type of float
        self.cache = NATIVE.Cache(self.memory, self.kv_type, 2, num_blocks, self.block_size, kv_heads, dim)

    def write(self, team: Any, starts: Sequence[int], stops: Sequence[int]) -> None:
        """Keys and values of positions [start, stop) of each sequence."""
        rows = [
            torch.cat((keys[start:stop], values[start:stop]), dim=1).flatten(1)
            for keys, values, start, stop in zip(self.keys, self.values, starts, stops, strict=True)
        ]
        counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
        NATIVE.write_kv(team, torch.cat(rows), self.cache, 1, lengths(counts), lengths(stops), self.tables)

    def attend(
        self, team: Any, queries: list[Tensor], contexts: Sequence[int], window: int, rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        """queries[i] [tokens, heads, dim] are the last of contexts[i] positions of sequence rows[i] (or i)."""
        query = torch.cat(queries)
        out = torch.full((query.shape[0], query.shape[1] * query.shape[2]), torch.nan)
        counts = [len(part) for part in queries]
        tables = self.tables if rows is None else self.tables[list(rows)]
        NATIVE.paged_attention(
            team, query.flatten(1), self.cache, 1, lengths(counts), lengths(contexts), tables, window, out
        )
        return list(out.view(query.shape).split(counts))


def rounded(kv_type: str, x: Tensor) -> Tensor:
    """x [..., dim] as the cache gives it back."""
    if kv_type == "float32":
        return x
    if kv_type == "float16":
        return x.half().float()
    codes, scale = to_int8(x)
    return codes * scale


def formula(query: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """float64 [tokens, heads, dim]: query [tokens, heads, dim] are the last positions of keys, values [n, kv, dim]."""
    tokens, heads, dim = query.shape
    context, kv_heads = keys.shape[:2]
    query = query.double().view(tokens, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("tghd,ngd->tghn", query, keys.double()) / math.sqrt(dim)
    own = torch.arange(context - tokens, context).view(-1, 1, 1, 1)
    at = torch.arange(context)
    hidden = (at > own) | (at <= own - window) if window else at > own
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("tghn,ngd->tghd", weights, values.double()).reshape(tokens, heads, dim)


def tensors(case: AttentionCase, seed: int = 0) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries, keys, values per sequence."""
    source = generator(seed)

    def draw(count: int, heads: int) -> Tensor:
        return torch.randn(count, heads, case.head_dim, generator=source) * 1.5

    return (
        [draw(count, case.num_heads) for count in case.query_lens],
        [draw(context, case.num_kv_heads) for context in case.context_lens],
        [draw(context, case.num_kv_heads) for context in case.context_lens],
    )


def run_case(case: AttentionCase, kv_type: str, team: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    queries, keys, values = tensors(case, seed)
    paged = Paged(kv_type, case.block_size, keys, values, seed)
    paged.write(team, [0] * len(keys), case.context_lens)
    out = torch.cat(paged.attend(team, queries, case.context_lens, case.window))
    parts = zip(queries, keys, values, strict=True)
    expected = [formula(q, rounded(kv_type, k), rounded(kv_type, v), case.window) for q, k, v in parts]
    return out, torch.cat(expected)


@each_level
@each_kv_type
@pytest.mark.parametrize("case", attention_cases(), ids=lambda case: case.label)
def test_attention_equals_the_formula(level: str, kv_type: str, case: AttentionCase) -> None:
    out, expected = run_case(case, kv_type, team_of(2, level))
    assert relative_error(out, expected) < case.tolerance
    assert (out.double() - expected).abs().max() < 1e-5


@st.composite
def any_attention(draw: st.DrawFn) -> AttentionCase:
    sequences = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 300)), min_size=1, max_size=4))
    kv_heads = draw(st.integers(1, 3))
    return AttentionCase(
        "drawn",
        query_lens=tuple(count for count, _ in sequences),
        context_lens=tuple(count + past for count, past in sequences),
        num_heads=kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 40)),
        block_size=16 * draw(st.integers(1, 4)),
        window=draw(st.sampled_from([0, 0, 1, 2, 15, 16, 17, 100, 256, 257])),
    )


@given(any_attention(), st.sampled_from(KV_TYPES), st.sampled_from(LEVELS), st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_attention_of_any_shape_equals_the_formula(case: AttentionCase, kv_type: str, level: str, threads: int) -> None:
    out, expected = run_case(case, kv_type, team_of(threads, level), seed=7)
    assert relative_error(out, expected) < case.tolerance


@each_level
@pytest.mark.parametrize("case", [c for c in attention_cases() if c.query_lens[0] == 1], ids=lambda case: case.label)
def test_attention_equals_the_torch_op(level: str, case: AttentionCase) -> None:
    """The op's own reference over its own cache, where decodes come first as its steps want them."""
    queries, keys, values = tensors(case)
    paged = Paged("float32", case.block_size, keys, values)
    paged.write(team_of(1, level), [0] * len(keys), case.context_lens)
    out = torch.cat(paged.attend(team_of(2, level), queries, case.context_lens, case.window))
    tables, device = np.maximum(paged.tables, 0), torch.device("cpu")
    past = AttentionStep(list(case.context_lens), list(case.context_lens), tables, case.block_size, device)
    cache = torch.zeros(int(tables.max()) + 1, case.block_size, 2 * case.num_kv_heads, case.head_dim)
    torch_write_kv(torch.cat([torch.cat(pair, dim=1) for pair in zip(keys, values, strict=True)]), cache, past)
    step = AttentionStep(list(case.query_lens), list(case.context_lens), tables, case.block_size, device)
    expected = torch_attention(torch.cat(queries), cache, step, case.window or None)
    assert relative_error(out, expected) < 2 * case.tolerance


# ---- the same bits in any company ----


@each_level
@each_kv_type
@pytest.mark.parametrize("window", [0, 40])
def test_company_threads_and_splits_change_no_bit(level: str, kv_type: str, window: int) -> None:
    """Decodes alone are split along their context, in company they are not; chunks are cut in tiles of queries."""
    contexts = (1000, 513, 17, 300, 40, 256)
    queries_lens = (1, 1, 1, 60, 40, 3)
    case = AttentionCase("company", queries_lens, contexts, 6, 2, 24, 32, window)
    queries, keys, values = tensors(case)
    paged = Paged(kv_type, 32, keys, values)
    paged.write(team_of(2, level), [0] * 6, contexts)
    whole = paged.attend(team_of(1, level), queries, contexts, window)
    for threads in (2, 3, 4):
        again = paged.attend(team_of(threads, level), queries, contexts, window)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    team = team_of(2, level)
    for row, context in enumerate(contexts):
        (alone,) = paged.attend(team, [queries[row]], [context], window, rows=[row])
        assert torch.equal(alone, whole[row])
    crowd = [0, 1, 2] * 12  # too many decodes to be split
    out = paged.attend(team, [queries[row] for row in crowd], [contexts[row] for row in crowd], window, rows=crowd)
    assert all(torch.equal(part, whole[row]) for part, row in zip(out, crowd, strict=True))


@each_level
@each_kv_type
@pytest.mark.parametrize("window", [0, 40])
def test_chunks_of_a_prompt_change_no_bit(level: str, kv_type: str, window: int) -> None:
    case = AttentionCase("prompt", (530,), (530,), 3, 1, 16, 16, window)
    (query,), keys, values = tensors(case)
    whole = None
    for chunk in (530, 1, 7, 16, 70, 255, 300):
        team = team_of(1 + chunk % 3, level)
        paged = Paged(kv_type, 16, keys, values, seed=chunk)
        parts = []
        for start in range(0, 530, chunk):
            stop = min(start + chunk, 530)
            if chunk == 1 and start % 53 not in (0, 1, 16):  # a sample of single tokens is enough
                paged.write(team, [start], [stop])
                parts.append(query.new_zeros(1, 3, 16) if whole is None else whole[start:stop])
                continue
            paged.write(team, [start], [stop])
            parts += paged.attend(team, [query[start:stop]], [stop], window)
        out = torch.cat(parts)
        whole = out if whole is None else whole
        assert torch.equal(out, whole), chunk


@each_level
@each_kv_type
def test_writing_touches_its_own_positions_alone(level: str, kv_type: str) -> None:
    """A cache written in pieces, by several threads, holds the same bytes as one written at once; layer 0 nothing."""
    case = AttentionCase("write", (1, 1), (70, 33), 2, 2, 10, 16, 0)
    _, keys, values = tensors(case)
    once, pieces = Paged(kv_type, 16, keys, values), Paged(kv_type, 16, keys, values)
    once.write(team_of(1, level), [0, 0], [70, 33])
    for start in range(0, 33, 3):
        pieces.write(team_of(3, level), [start, start], [start + 3, start + 3])
    pieces.write(team_of(2, level), [33, 32], [70, 33])
    assert np.array_equal(once.memory, pieces.memory)
    half = len(once.memory) // 2
    assert (once.memory[:half] == 0xFF).all()
    assert (once.memory[half:] != 0xFF).any()


@each_level
@each_kv_type
def test_levels_write_the_same_bytes(level: str, kv_type: str) -> None:
    case = AttentionCase("write", (1,), (50,), 2, 2, 18, 16, 0)
    _, keys, values = tensors(case)
    keys[0][3, 0], values[0][4, 1] = 0.0, 0.0
    keys[0][5] = torch.arange(-9, 9) * 127.0 / 9 + 0.5  # half-way to even
    one, other = Paged(kv_type, 16, keys, values), Paged(kv_type, 16, keys, values)
    one.write(team_of(1, level), [0], [50])
    other.write(team_of(1, "portable"), [0], [50])
    assert np.array_equal(one.memory, other.memory)


# ---- numbers that are not finite ----


@each_level
@each_kv_type
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_sequence_that_is_not_finite_stays_so_and_alone(level: str, kv_type: str, where: str, poison: float) -> None:
    case = AttentionCase("poison", (1, 4, 1), (300, 20, 40), 4, 2, 12, 16, 0)
    queries, keys, values = tensors(case)

    def run(bad: bool) -> list[Tensor]:
        parts = {"query": queries, "key": keys, "value": values}[where]
        kept, changed = parts[1], parts[1].clone()
        changed[-1] = poison if bad else changed[-1]
        parts[1] = changed
        paged = Paged(kv_type, 16, keys, values)
        paged.write(team_of(2, level), [0] * 3, case.context_lens)
        out = paged.attend(team_of(2, level), queries, case.context_lens, 0)
        parts[1] = kept
        return out

    clean, bad = run(False), run(True)
    assert torch.equal(bad[0], clean[0])
    assert torch.equal(bad[2], clean[2])
    assert not bad[1][-1].isfinite().any()


# ---- what is refused ----


@pytest.fixture
def step() -> dict[str, Any]:
    """A right call: two sequences of 1 and 3 tokens."""
    memory = np.zeros(4 * NATIVE.Cache.bytes_per_block("float32", 16, 2, 8), dtype=np.uint8)
    return {
        "query": torch.ones(4, 32),
        "cache": NATIVE.Cache(memory, "float32", 1, 4, 16, 2, 8),
        "layer": 0,
        "query_lens": lengths([1, 3]),
        "context_lens": lengths([20, 3]),
        "tables": np.array([[0, 3], [1, -1]], dtype=np.int64),
        "window": 0,
        "out": torch.zeros(4, 32),
    }


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"query": torch.ones(4, 33)}, "query must be"),
    ({"query": torch.ones(4, 24)}, "query must be"),
    ({"query": torch.ones(4, 0)}, "query must be"),
    ({"query": torch.ones(4, 2 * 65 * 8), "out": torch.ones(4, 2 * 65 * 8)}, "at most 64 heads"),
    ({"query": torch.ones(3, 32)}, "row per token"),
    ({"out": torch.ones(4, 16)}, "row per token"),
    ({"out": torch.ones(5, 32)}, "row per token"),
    ({"layer": 1}, "no such layer"),
    ({"layer": -1}, "no such layer"),
    ({"window": -1}, "row per token|window"),
    ({"query_lens": lengths([1])}, "one entry per sequence"),
    ({"context_lens": lengths([20])}, "one entry per sequence"),
    ({"tables": np.array([[0, 3]])}, "one entry per sequence"),
    ({"query_lens": lengths([0, 4])}, "sequence 0"),
    ({"query_lens": lengths([-1, 5])}, "sequence 0"),
    ({"context_lens": lengths([20, 2])}, "sequence 1: 3 of 2 tokens"),
    ({"context_lens": lengths([33, 3])}, "sequence 0: 1 of 33 tokens do not fit a table of 2 blocks"),
    ({"context_lens": lengths([2**31 - 1, 3])}, "sequence 0"),
    ({"tables": np.array([[0, 4], [1, -1]])}, r"block 4 is not in 0\.\.3"),
    ({"tables": np.array([[0, -1], [1, -1]])}, r"block -1 is not in 0\.\.3"),
    ({"tables": np.array([[0, 1], [2**40, 0]])}, "block 1099511627776"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_steps_that_do_not_fit_are_refused_and_the_team_goes_on(
    step: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    team = team_of(2, "")
    with pytest.raises(ValueError, match=message):
        NATIVE.paged_attention(team, *{**step, **change}.values())
    NATIVE.paged_attention(team, *step.values())
    assert step["out"].abs().max() == 0  # the cache holds zeros


def test_results_and_caches_are_never_converted_copies(step: dict[str, Any]) -> None:
    team = team_of(1, "")
    for wrong in (torch.zeros(4, 32).double(), torch.zeros(32, 4).t()):
        with pytest.raises(TypeError):
            NATIVE.paged_attention(team, *{**step, "out": wrong}.values())
    num_bytes = 4 * NATIVE.Cache.bytes_per_block("float32", 16, 2, 8)
    for memory in (
        np.zeros(num_bytes, np.int8),
        np.zeros(2 * num_bytes, np.uint8)[::2],
        np.zeros((1, num_bytes), np.uint8),
    ):
        with pytest.raises(TypeError):
            NATIVE.Cache(memory, "float32", 1, 4, 16, 2, 8)


def test_a_step_of_no_sequences_is_no_work(step: dict[str, Any]) -> None:
    empty = torch.zeros(0, 32), step["cache"], 0, lengths([]), lengths([]), np.zeros((0, 2), np.int64)
    NATIVE.write_kv(team_of(2, ""), *empty)
    NATIVE.paged_attention(team_of(2, ""), *empty, 0, torch.zeros(0, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(4, 31)}, "key_value must be"),
        ({"query": torch.ones(3, 32)}, "key_value must be"),
        ({"layer": 1}, "no such layer"),
        ({"context_lens": lengths([33, 3])}, "sequence 0: 1 of 33 tokens"),
        ({"tables": np.array([[0, 4], [1, -1]])}, "block 4"),
    ],
)
def test_writes_that_do_not_fit_are_refused(step: dict[str, Any], change: dict[str, Any], message: str) -> None:
    parts = list({**step, **change}.values())[:6]
    with pytest.raises(ValueError, match=message):
        NATIVE.write_kv(team_of(2, ""), *parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "bfloat16"}, "unknown cache type 'bfloat16'"),
        ({"block_size": 8}, "multiple of 16"),
        ({"block_size": 0}, "multiple of 16"),
        ({"block_size": -16}, "multiple of 16"),
        ({"head_dim": 7}, "head_dim must be even and at most 256"),
        ({"head_dim": 258}, "head_dim must be even and at most 256"),
        ({"num_blocks": 3}, "the cache has .* bytes, expected"),
        ({"num_layers": 2}, "the cache has .* bytes, expected"),
        ({"num_kv_heads": 0}, "a cache needs layers, blocks and key heads"),
        ({"num_blocks": -4, "num_layers": -1}, "a cache needs layers, blocks and key heads"),
        ({"type": "float16"}, "the cache has"),
    ],
)
def test_caches_say_what_is_wrong_with_them(change: dict[str, Any], message: str) -> None:
    memory = np.zeros(4 * NATIVE.Cache.bytes_per_block("float32", 16, 2, 8), dtype=np.uint8)
    right = {"type": "float32", "num_layers": 1, "num_blocks": 4, "block_size": 16, "num_kv_heads": 2, "head_dim": 8}
    NATIVE.Cache(memory, **right)
    with pytest.raises(ValueError, match=message):
        NATIVE.Cache(memory, **{**right, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 2**32, "num_layers": 2**32},
        {"num_blocks": 2**62},
        {"num_kv_heads": 2**62},
        {"block_size": 2**62},
    ],
    ids=str,
)
def test_a_cache_too_large_to_exist_does_not_pass_for_an_empty_one(change: dict[str, int]) -> None:
    right = {"type": "float32", "num_layers": 1, "num_blocks": 4, "block_size": 16, "num_kv_heads": 2, "head_dim": 8}
    with pytest.raises(ValueError, match=r"."):
        NATIVE.Cache(np.zeros(0, dtype=np.uint8), **{**right, **change})
