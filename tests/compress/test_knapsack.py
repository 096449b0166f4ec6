"""The knapsack's frontier: what trying everything finds, monotone, and near that when its states are thinned."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.compress.knapsack import Choices, solve

CHOICES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 1000).map(lambda n: n / 8)), min_size=1, max_size=4)
GROUPS = st.lists(CHOICES, min_size=1, max_size=5)


def by_trial(groups: list[Choices], budget: float) -> float | None:
    """The least loss within a budget, by trying every combination."""
    ways = [(sum(c for c, _ in way), sum(loss for _, loss in way)) for way in itertools.product(*groups)]
    return min((loss for cost, loss in ways if cost <= budget), default=None)


@given(GROUPS, st.integers(0, 150))
def test_it_finds_what_trying_everything_finds(groups: list[Choices], budget: int) -> None:
    frontier = solve(groups)
    point, expected = frontier.within(budget), by_trial(groups, budget)
    assert (point is None) == (expected is None)
    if point is None:
        return
    assert frontier.losses[point] == expected
    assert frontier.costs[point] <= budget
    # the cheapest way to that loss is within the budget, and loses no more
    other = frontier.cheapest(float(frontier.losses[point]))
    assert other == point


@given(GROUPS, st.integers(2, 30))
def test_more_budget_never_loses_more(groups: list[Choices], max_states: int) -> None:
    frontier = solve(groups, max_states)
    assert (np.diff(frontier.costs) > 0).all()
    assert (np.diff(frontier.losses) < 0).all()
    for point in range(len(frontier.costs)):
        ways = [group[choice] for group, choice in zip(groups, frontier.choices(point), strict=True)]
        assert sum(cost for cost, _ in ways) == frontier.costs[point]
        assert sum(loss for _, loss in ways) == pytest.approx(frontier.losses[point])


@given(GROUPS)
def test_the_ends_are_the_cheapest_and_the_best(groups: list[Choices]) -> None:
    frontier = solve(groups, 4)
    assert frontier.costs[0] == sum(min(cost for cost, _ in group) for group in groups)
    assert frontier.losses[-1] == sum(min(loss for _, loss in group) for group in groups)
    assert frontier.within(frontier.costs[0] - 1) is None
    assert frontier.cheapest(float(frontier.losses[-1]) - 0.01) is None


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_thinned_states_stay_near_the_exact_frontier(seed: int) -> None:
    source = np.random.default_rng(seed)
    sizes, grain = source.integers(1, 9, 12) * 1000, source.exponential(size=12)
    groups = [
        [(int(size * bits + source.integers(0, 50)), float(weight * 4.0**-bits)) for bits in (2, 3, 4, 5, 8)]
        for size, weight in zip(sizes, grain, strict=True)
    ]
    exact, thinned = solve(groups, 10**6), solve(groups, 2000)
    for budget in np.linspace(exact.costs[0], exact.costs[-1], 20):
        best, found = exact.within(budget), thinned.within(budget)
        assert best is not None
        assert found is not None
        assert thinned.losses[found] <= 1.05 * exact.losses[best]
