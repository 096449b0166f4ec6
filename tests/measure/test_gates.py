"""Gates: how they are written, what they are held against, and that an interval never decides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powertrain.measure.gates import Gate, check_gates_can_be_held, hold, parse_gates
from powertrain.types import PowertrainError

EVALUATION: Any = SimpleNamespace(
    kl_mean=0.04, top1_agreement=0.9, ppl_ratio=1.1, intervals={"kl_mean": (0.03, 0.06), "top1_agreement": (0.8, 0.95)}
)
SCORES = {
    "acc": SimpleNamespace(flips=0.02, flips_interval=(0.01, 0.04)),
    "acc_norm": SimpleNamespace(flips=0.05, flips_interval=(0.03, 0.08)),
}
TASK: Any = SimpleNamespace(name="arc", scores=SCORES)


def test_they_are_read():
    assert parse_gates(["max-kl=0.05", "min-top1=.9", "max-ppl-ratio=1.02", "max-flips=0"]) == [
        Gate("max-kl", 0.05),
        Gate("min-top1", 0.9),
        Gate("max-ppl-ratio", 1.02),
        Gate("max-flips", 0.0),
    ]


@pytest.mark.parametrize(
    "text", ["max-kl", "max-kl=", "max-kl=x", "max-kl=nan", "max-kl=inf", "max-kl=-1", "kl=1", "", "min-top1=1.5"]
)
def test_others_are_refused(text: str):
    with pytest.raises(PowertrainError, match=r"--gate must be a name and a limit like max-kl=0\.05") as refused:
        parse_gates([text])
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("gate", "is_met", "text"),
    [
        ("max-kl=0.05", True, "holds: kl_mean is 0.04, 95 % interval [0.03, 0.06]; the limit lies within it"),
        ("max-kl=0.1", True, "holds: kl_mean is 0.04, 95 % interval [0.03, 0.06]"),
        ("max-kl=0.04", True, "holds: kl_mean is 0.04, 95 % interval [0.03, 0.06]; the limit lies within it"),
        ("max-kl=0.035", False, "is broken: kl_mean is 0.04, 95 % interval [0.03, 0.06]; the limit lies within it"),
        ("min-top1=0.89", True, "holds: top1_agreement is 0.9, 95 % interval [0.8, 0.95]; the limit lies within it"),
        ("min-top1=0.99", False, "is broken: top1_agreement is 0.9, 95 % interval [0.8, 0.95]"),
        ("max-ppl-ratio=1.05", False, "is broken: ppl_ratio is 1.1"),
    ],
)
def test_the_value_decides_and_the_interval_is_told(gate: str, is_met: bool, text: str):
    (verdict,) = hold(parse_gates([gate]), EVALUATION, [])
    assert verdict.is_met == is_met
    assert str(verdict) == f"gate {gate} {text}"
    assert verdict.to_dict()["is_met"] == is_met


def test_flips_are_held_in_every_task_and_score():
    verdicts = hold(parse_gates(["max-flips=0.03"]), None, [TASK, TASK])
    assert [(verdict.of, verdict.is_met) for verdict in verdicts] == [
        ("arc acc flips", True),
        ("arc acc_norm flips", False),
    ] * 2


def test_what_is_not_measured_cannot_be_gated():
    with pytest.raises(PowertrainError, match=r"--gate max-flips=0\.1 needs a --task"):
        check_gates_can_be_held(parse_gates(["max-flips=0.1"]), has_data=True, has_tasks=False)
    with pytest.raises(PowertrainError, match=r"--gate max-kl=0\.1 needs --data other than none"):
        check_gates_can_be_held(parse_gates(["max-kl=0.1"]), has_data=False, has_tasks=True)
    check_gates_can_be_held(parse_gates(["max-kl=1", "max-flips=1"]), has_data=True, has_tasks=True)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 5), st.floats(0, 5))
def test_intervals_do_not_decide(limit: float, value: float, below: float, above: float):
    evaluation: Any = SimpleNamespace(kl_mean=value, intervals={"kl_mean": (value - below, value + above)})
    (verdict,) = hold([Gate("max-kl", limit)], evaluation, [])
    assert verdict.is_met == (value <= limit)
