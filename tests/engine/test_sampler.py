"""The sampler against plain arithmetic and against transformers' logits processors."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.engine.sampler import Row, _probabilities, logprobs_of, sample, uniform
from powertrain.types import SamplingParams


def row(context=(1, 2), num_prompt=2, eos=(0,), seed=0, index=0, **sampling):
    return Row(SamplingParams(**sampling), list(context), num_prompt, eos, seed, index)


def test_greedy_is_the_argmax():
    logits = torch.randn(5, 50)
    expected = logits.argmax(-1).tolist()
    assert sample(logits, [row(temperature=0.0)] * 5) == expected


def test_draws_follow_the_distribution_and_repeat():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    rows = [row(seed=at) for at in range(20_000)]
    drawn = sample(logits.repeat(len(rows), 1), rows)
    counts = torch.bincount(torch.tensor(drawn), minlength=4) / len(rows)
    torch.testing.assert_close(counts, logits[0].softmax(-1), atol=0.015, rtol=0)
    assert drawn == sample(logits.repeat(len(rows), 1), rows)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1), index=st.integers(0, 15), position=st.integers(0, 2**20))
def test_uniform_is_in_range_and_depends_on_each_argument(seed, index, position):
    number = uniform(seed, index, position)
    assert 0.0 <= number < 1.0
    assert number != uniform(seed + 1, index, position)
    assert number != uniform(seed, index + 1, position)
    assert number != uniform(seed, index, position + 1)


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"top_k": 5}, [transformers.TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [transformers.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [transformers.MinPLogitsWarper(0.1)]),
        (
            {"temperature": 0.5, "top_k": 9, "top_p": 0.8},
            [
                transformers.TemperatureLogitsWarper(0.5),
                transformers.TopKLogitsWarper(9),
                transformers.TopPLogitsWarper(0.8),
            ],
        ),
    ],
)
def test_truncation_equals_transformers(params, warpers):
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(1)) * 3
    expected = logits.clone()
    for warper in warpers:
        expected = warper(None, expected)
    mixed = [SamplingParams(**params)] * 8
    torch.testing.assert_close(_probabilities(logits, mixed), expected.softmax(-1), atol=1e-6, rtol=1e-4)


def test_rows_with_different_settings_do_not_mix():
    logits = torch.randn(3, 40)
    params = [SamplingParams(top_k=1), SamplingParams(), SamplingParams(top_p=0.3, temperature=2.0)]
    together = _probabilities(logits, params)
    for at, one in enumerate(params):
        torch.testing.assert_close(together[at : at + 1], _probabilities(logits[at : at + 1], [one]))


def test_repetition_penalty_equals_transformers():
    logits = torch.randn(1, 30)
    context = [3, 4, 4, 9]
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([context]), logits.clone())
    sample(logits, [row(context=context, temperature=0.0, repetition_penalty=1.7)])
    torch.testing.assert_close(logits, expected)


def test_presence_and_frequency_count_the_output_only():
    logits = torch.zeros(1, 10)
    sample(logits, [row(context=[1, 2, 5, 5, 6], temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)])
    assert logits[0].tolist() == [0, 0, 0, 0, 0, -1.0, -0.75, 0, 0, 0]


def test_bias_and_min_tokens():
    logits = torch.zeros(1, 10)
    logits[0, 0] = 9.0
    picked = sample(logits, [row(temperature=0.0, logit_bias={4: 5.0}, min_tokens=1, stop_token_ids=(7,))])
    assert picked == [4]
    assert torch.isinf(logits[0, [0, 7]]).all()


def test_a_bad_row_is_told_and_leaves_the_others_alone():
    logits = torch.randn(3, 20)
    clean = logits.clone()
    logits[1, 3] = torch.nan
    picked = sample(logits, [row(temperature=0.0), row(), row(temperature=0.0)])
    assert picked[1] is None
    assert [picked[0], picked[2]] == clean[[0, 2]].argmax(-1).tolist()


def test_logprobs_hold_the_same_float_twice():
    logits = torch.randn(4, 30)
    tokens = logits.argmax(-1).tolist()
    for entry, line in zip(logprobs_of(logits, tokens, [3] * 4), logits.log_softmax(-1), strict=True):
        assert entry.rank == 1
        assert entry.logprob == max(entry.top_logprobs) == line.max().item()
        assert list(entry.top_token_ids) == line.topk(3).indices.tolist()


def test_a_top_p_below_float32_keeps_the_best_token():
    logits = torch.randn(2, 20)
    assert sample(logits.clone(), [row(top_p=1e-300), row(top_p=1e-300, seed=9)]) == logits.argmax(-1).tolist()
