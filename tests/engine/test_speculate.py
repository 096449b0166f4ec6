"""The n-gram proposer against a reading of its definition that nobody could call fast."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.config import SpeculationConfig
from powertrain.engine.speculate import NgramProposer
from powertrain.types import PowertrainError


def slow_propose(ids: list[int], num_tokens: int, low: int, high: int) -> list[int]:
    for n in range(high, low - 1, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[len(ids) - n :]:
                known = list(ids)
                for i in range(num_tokens):
                    known.append(known[start + n + i])
                return known[len(ids) :]
    return []


def proposer(num_tokens: int = 4, low: int = 2, high: int = 4) -> NgramProposer:
    config = SpeculationConfig(num_speculative_tokens=num_tokens, prompt_lookup_min=low, prompt_lookup_max=high)
    return NgramProposer(config)


@settings(max_examples=600, deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), max_size=60),
    num_tokens=st.integers(1, 8),
    low=st.integers(1, 4),
    extra=st.integers(0, 3),
    budget=st.integers(0, 10),
)
def test_equals_the_definition(ids: list[int], num_tokens: int, low: int, extra: int, budget: int) -> None:
    got = proposer(num_tokens, low, low + extra).propose(ids, budget)
    assert got == slow_propose(ids, min(num_tokens, budget), low, low + extra)
    assert all(type(token) is int for token in got)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40), budget=st.integers(-2, 10))
def test_drafts_come_from_the_sequence_and_respect_the_budget(ids: list[int], budget: int) -> None:
    before = list(ids)
    draft = proposer().propose(ids, budget)
    assert len(draft) <= max(0, min(4, budget))
    assert set(draft) <= set(ids)
    assert ids == before


def test_longest_match_beats_a_more_recent_shorter_one() -> None:
    ids = [1, 2, 3, 4, 50, 51, 9, 3, 4, 60, 61, 1, 2, 3, 4]
    assert proposer(2).propose(ids, 2) == [50, 51]
    assert proposer(2, high=2).propose(ids, 2) == [60, 61]


def test_most_recent_of_equal_matches_wins() -> None:
    assert proposer(1).propose([5, 6, 70, 5, 6, 80, 5, 6], 1) == [80]


def test_a_loop_is_drafted_beyond_the_known_end() -> None:
    assert proposer(6).propose([1, 2, 3, 1, 2, 3, 1, 2], 6) == [3, 1, 2, 3, 1, 2]
    assert proposer(4).propose([7, 7, 7], 4) == [7, 7, 7, 7]


def test_nothing_to_repeat() -> None:
    assert proposer().propose(list(range(100)), 4) == []
    assert proposer().propose([], 4) == []
    assert proposer().propose([1], 4) == []


def test_arrays_and_lists_agree_on_a_long_sequence() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50_000, 20_000).tolist()
    ids += ids[5_000:5_004]
    want = ids[5_004:5_008]
    assert proposer().propose(ids, 4) == want
    assert proposer().propose(array("i", ids), 4) == want
    assert proposer().propose(tuple(ids), 4) == want


@pytest.mark.parametrize(("low", "high", "num_tokens"), [(0, 4, 4), (3, 2, 4), (2, 4, 0)])
def test_bad_settings_are_refused(low: int, high: int, num_tokens: int) -> None:
    with pytest.raises(PowertrainError, match="must be at least 1"):
        proposer(num_tokens, low, high)
