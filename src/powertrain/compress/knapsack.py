"""One choice of each group so that the loss is least for its cost: the multiple-choice knapsack, at all budgets.

States (cost, loss) are merged group by group, and those that another one beats in both are dropped (Nemhauser and
Ullmann 1969): exact while the states fit, else thinned to the best of each of as many equal ranges of cost. Thinned or
not, every state is a real choice with its exact cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_STATES = 16384
"""A state is then a range of 1/16384 of all that can be spent: small beside what one matrix costs in a model of 100."""

Choices = Sequence[tuple[int, float]]
"""(cost, loss) of each way a group can go."""


@dataclass(frozen=True, slots=True)
class Frontier:
    """The choices that no other beats: costs int64 [n] rise, losses float64 [n] fall, both strictly.

    history: of each group, (state before, choice) int64 [states] that led to each of its states.
    """

    costs: np.ndarray
    losses: np.ndarray
    history: tuple[tuple[np.ndarray, np.ndarray], ...]

    def within(self, cost: float) -> int | None:
        """The point with the least loss at this cost or below; None if everything costs more."""
        point = int(np.searchsorted(self.costs, cost, side="right")) - 1
        return point if point >= 0 else None

    def cheapest(self, loss: float) -> int | None:
        """The cheapest point with this loss or less; None if every one loses more."""
        point = int(np.searchsorted(-self.losses, -loss, side="left"))
        return point if point < len(self.losses) else None

    def choices(self, point: int) -> list[int]:
        """Which way each group goes at a point of the frontier."""
        picked = []
        for before, choice in reversed(self.history):
            picked.append(int(choice[point]))
            point = int(before[point])
        return picked[::-1]


def solve(groups: Sequence[Choices], max_states: int = MAX_STATES) -> Frontier:
    """The frontier over one choice of each group. Costs are whole numbers; both add up, and neither is negative."""
    costs, losses = np.zeros(1, dtype=np.int64), np.zeros(1)
    history = []
    for choices in groups:
        own_costs = np.array([cost for cost, _ in choices], dtype=np.int64)
        own_losses = np.array([loss for _, loss in choices], dtype=np.float64)
        all_costs = (costs[:, None] + own_costs).ravel()
        all_losses = (losses[:, None] + own_losses).ravel()
        kept = _thinned(_undominated(all_costs, all_losses), all_costs, max_states)
        costs, losses = all_costs[kept], all_losses[kept]
        history.append((kept // len(choices), kept % len(choices)))
    return Frontier(costs, losses, tuple(history))


def _undominated(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices by rising cost of the states with less loss than all that cost no more."""
    order = np.lexsort((losses, costs))
    least = np.minimum.accumulate(losses[order])
    is_kept = np.concatenate(([True], losses[order][1:] < least[:-1]))
    undominated: np.ndarray = order[is_kept]
    return undominated


def _thinned(kept: np.ndarray, costs: np.ndarray, max_states: int) -> np.ndarray:
    """Of each range of cost the state with the least loss, which is its last, and the cheapest of all."""
    if len(kept) <= max_states:
        return kept
    first, last = int(costs[kept[0]]), int(costs[kept[-1]])
    ranges = (costs[kept] - first) * (max_states - 1) // (last - first + 1)
    is_last = np.concatenate((ranges[1:] != ranges[:-1], [True]))
    is_last[0] = True
    left: np.ndarray = kept[is_last]
    return left
