from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.optimize.choice import choose, reasons_against, relaxed
from powertrain.optimize.space import Fidelity, Format, Limits, Measured, Setting, Speed


def candidate(
    name: str, kl: float = 0.01, tpot: float = 20.0, ttft: float = 100.0, memory: int = 10**9, rate: float = 50.0
) -> Measured:
    fidelity = Fidelity(kl=kl, kl_low=kl, kl_high=kl, kl_small_batch=kl, top1_agreement=0.9, ppl_ratio=1.0)
    speed = Speed(ttft_ms=ttft, tpot_ms=tpot, output_tokens_per_s=rate, memory_bytes=memory, weight_bytes=1)
    return Measured(format=Format(name), setting=Setting("default"), fidelity=fidelity, speed=speed)


positive = st.floats(1e-6, 1e6)
candidate_lists = st.lists(
    st.tuples(st.floats(0, 10), positive, positive, st.integers(1, 10**12), positive), min_size=0, max_size=8
).map(lambda rows: [candidate(f"c{number}", *row) for number, row in enumerate(rows)])
any_limits = st.builds(
    Limits,
    tpot_ms=st.none() | positive,
    ttft_ms=st.none() | positive,
    max_kl=st.none() | st.floats(0, 10),
    max_memory=st.none() | st.integers(0, 10**12),
)


def meets(measured: Measured, limits: Limits) -> bool:
    """The limits once more, written apart from the code under test."""
    assert measured.fidelity is not None
    assert measured.speed is not None
    pairs = (
        (measured.fidelity.kl, limits.max_kl),
        (measured.speed.tpot_ms, limits.tpot_ms),
        (measured.speed.ttft_ms, limits.ttft_ms),
        (measured.speed.memory_bytes, limits.max_memory),
    )
    return all(limit is None or value <= limit for value, limit in pairs)


@settings(deadline=None)
@given(candidate_lists, any_limits)
def test_the_winner_is_the_fastest_that_meets_every_limit(candidates: list[Measured], limits: Limits) -> None:
    choice = choose(candidates, limits)
    good = [c for c in candidates if meets(c, limits)]
    if not good:
        assert choice.winner is None
    else:
        assert choice.winner in good
        assert choice.winner.speed.output_tokens_per_s == max(c.speed.output_tokens_per_s for c in good)  # type: ignore[union-attr]
        assert choice.relaxations == ()


@settings(deadline=None)
@given(candidate_lists, any_limits)
def test_everybody_but_the_winner_gets_a_reason(candidates: list[Measured], limits: Limits) -> None:
    choice = choose(candidates, limits)
    losers = {c.name for c in candidates if c is not choice.winner}
    assert set(choice.rejections) == losers
    assert all(choice.rejections.values())


@settings(deadline=None)
@given(candidate_lists, any_limits)
def test_following_the_advice_works(candidates: list[Measured], limits: Limits) -> None:
    choice = choose(candidates, limits)
    if choice.winner is None and candidates:
        assert choice.relaxations
    for relaxation in choice.relaxations:
        again = choose(candidates, relaxed(limits, relaxation))
        assert again.winner is not None
        admitted = next(c for c in candidates if c.name == relaxation.candidate)
        assert meets(admitted, relaxed(limits, relaxation))


@settings(deadline=None)
@given(candidate_lists, any_limits)
def test_no_advice_asks_for_more_than_its_candidate_needs(candidates: list[Measured], limits: Limits) -> None:
    for relaxation in choose(candidates, limits).relaxations:
        for name, value in relaxation.limits.items():
            own = getattr(limits, name)
            assert own is not None
            assert value > own


def test_reasons_name_the_number_and_the_flag() -> None:
    limits = Limits(tpot_ms=20, ttft_ms=90, max_kl=0.05, max_memory=600 * 10**6)
    reasons = reasons_against(candidate("W4A16 g64", kl=0.12, tpot=20.04), limits)
    assert reasons == (
        "KL 0.12 > --max-kl 0.05",
        "TPOT 20.04 > --tpot-ms 20",
        "TTFT 100 > --ttft-ms 90",
        "memory 1000MB > --max-memory 600MB",
    )


def test_the_worse_of_both_paths_is_held_against_the_limit() -> None:
    made = candidate("W4A16 g64", kl=0.01)
    assert made.fidelity is not None
    bad_kernel = Fidelity(kl=0.01, kl_low=0.01, kl_high=0.01, kl_small_batch=0.2, top1_agreement=0.9, ppl_ratio=1.0)
    broken = Measured(format=made.format, setting=made.setting, fidelity=bad_kernel, speed=made.speed)
    assert choose([made], Limits(max_kl=0.05)).winner is made
    assert choose([broken], Limits(max_kl=0.05)).winner is None


def test_what_was_not_measured_cannot_win() -> None:
    made = candidate("W8A16 channel")
    unmeasured = Measured(format=made.format, setting=made.setting, fidelity=made.fidelity)
    failed = Measured(format=Format("x"), setting=made.setting, fidelity=made.fidelity, failure="it crashed")
    choice = choose([unmeasured, failed], Limits())
    assert choice.winner is None
    assert choice.relaxations == ()
    assert choice.rejections == {"W8A16 channel · default": ("not measured",), "x · default": ("it crashed",)}


def test_nothing_is_kept_for_a_kl_that_is_no_number() -> None:
    assert choose([candidate("x", kl=float("nan"))], Limits(max_kl=0.5)).winner is None


def test_advice_is_the_smallest_change_of_each_limit_alone() -> None:
    limits = Limits(tpot_ms=10, max_kl=0.01)
    slow = candidate("slow", kl=0.005, tpot=12.0)
    slower = candidate("slower", kl=0.005, tpot=15.0)
    crude = candidate("crude", kl=0.1, tpot=5.0)
    choice = choose([slower, slow, crude], limits)
    assert [r.candidate for r in choice.relaxations] == ["slow · default", "crude · default"]
    assert str(choice.relaxations[0]) == "--tpot-ms 13 would admit slow · default"


def test_advice_names_two_limits_where_both_need_less_than_either_alone() -> None:
    limits = Limits(tpot_ms=10, max_kl=0.01)
    slow = candidate("slow", kl=0.005, tpot=12.0)
    near = candidate("near", kl=0.0101, tpot=10.1)
    far = candidate("far", kl=0.02, tpot=11.0)
    first, second = choose([far, slow, near], limits).relaxations
    assert str(first) == "--max-kl 0.011 and --tpot-ms 11 would admit near · default"
    assert second.candidate == "slow · default"


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_limits_are_checked(bad: float) -> None:
    from powertrain.types import PowertrainError

    with pytest.raises(PowertrainError, match="--tpot-ms"):
        Limits(tpot_ms=bad)
