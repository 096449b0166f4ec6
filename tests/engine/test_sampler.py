"""The sampler against plain arithmetic and against transformers' logits processors."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.engine.sampler import (
    Row,
    _draw,
    _probabilities,
    logprobs_of,
    num_candidates,
    sample,
    sample_top,
    uniform,
)
from powertrain.model.decoder import top_of
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


SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-6, 0.3, 1.0, 3.0]),
        "top_k": st.sampled_from([1, 2, 5, 20, 64]),
        "top_p": st.sampled_from([1e-300, 0.3, 0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "seed": st.integers(0, 2**40),
    }
)


def rows_of(settings):
    return [row(seed=given.pop("seed"), **given) for given in map(dict, settings)]


def short_tokens(logits, rows, k=None):
    """What the rows get from their largest logits alone, and which of them that does not decide."""
    return sample_top(*top_of(logits, k or min(max(map(num_candidates, rows)), logits.shape[1])), rows)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**31), wanted=st.lists(SETTINGS, min_size=1, max_size=6), spread=st.sampled_from([0.5, 8]))
def test_the_largest_logits_give_the_tokens_that_all_of_them_give(seed, wanted, spread):
    rows = rows_of(wanted)
    logits = torch.randn(len(rows), 200, generator=torch.Generator().manual_seed(seed)) * spread
    found, undecided = short_tokens(logits, rows)
    assert undecided == []
    assert found == sample(logits.clone(), rows)
    random = [at for at, one in enumerate(rows) if not one.sampling.is_greedy]
    assert [found[at] for at in random] == _draw(logits[random], [rows[at] for at in random])


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**31), wanted=st.lists(SETTINGS, min_size=1, max_size=6), levels=st.integers(1, 40))
def test_equal_logits_at_the_cut_are_left_to_the_whole_row(seed, wanted, levels):
    """Few distinct values: the cut often falls between equals, and what is decided anyway must still be right."""
    rows = rows_of(wanted)
    logits = torch.randint(levels, (len(rows), 100), generator=torch.Generator().manual_seed(seed)) / 4.0
    found, undecided = short_tokens(logits, rows)
    expected = sample(logits.clone(), rows)
    ordered = logits.sort(-1, descending=True).values
    for at, one in enumerate(rows):
        top_k = one.sampling.top_k
        is_tied = bool(ordered[at, top_k - 1] == ordered[at, top_k])
        # a division by a tiny temperature never makes equals of these, so the cut is judged by the logits
        assert (at in undecided) == (is_tied and not one.sampling.is_greedy)
        assert at in undecided or found[at] == expected[at]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), wanted=st.lists(SETTINGS, min_size=2, max_size=6))
def test_a_short_row_does_not_depend_on_its_company(seed, wanted):
    rows = rows_of(wanted)
    logits = torch.randn(len(rows), 100, generator=torch.Generator().manual_seed(seed))
    together, _ = short_tokens(logits, rows, k=70)
    alone = [short_tokens(logits[at : at + 1], [one])[0][0] for at, one in enumerate(rows)]
    assert together == alone


@pytest.mark.parametrize(
    ("sampling", "count"),
    [
        ({"temperature": 0.0}, 1),
        ({"temperature": 0.0, "top_k": 9}, 1),
        ({"top_k": 9}, 10),
        ({"top_k": 9, "top_p": 0.5, "min_p": 0.1}, 10),
        ({}, None),
        ({"top_k": 65}, None),
        ({"top_k": 9, "logprobs": 0}, None),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, None),
        ({"temperature": 0.0, "presence_penalty": 0.1}, None),
        ({"temperature": 0.0, "frequency_penalty": 0.1}, None),
        ({"temperature": 0.0, "logit_bias": {3: 1.0}}, None),
        ({"temperature": 0.0, "min_tokens": 2, "max_tokens": 5}, None),
    ],
)
def test_which_rows_need_only_their_largest_logits(sampling, count):
    assert num_candidates(row(**sampling)) == count


def test_min_tokens_bind_only_until_they_are_out():
    assert num_candidates(row(context=(1, 2, 3, 4), temperature=0.0, min_tokens=2, max_tokens=5)) == 1


def test_a_short_row_with_a_bad_number_is_told():
    logits = torch.randn(3, 50)
    logits[1, 7] = torch.nan
    rows = [row(temperature=0.0), row(temperature=0.0), row(top_k=5)]
    found, undecided = short_tokens(logits, rows)
    assert found[0] == int(logits[0].argmax())
    assert (found[1], undecided) == (None, [])
    assert found[2] in logits[2].topk(5).indices


@pytest.mark.parametrize("k", [1, 2, 7, 30])
def test_top_of_orders_by_value_then_id(k):
    logits = torch.randint(12, (40, 30), generator=torch.Generator().manual_seed(k)).float()
    logits[0] = torch.randn(30)
    values, ids, finite = top_of(logits, k)
    for at, line in enumerate(logits.tolist()):
        expected = sorted(range(30), key=lambda token: (-line[token], token))[:k]
        assert ids[at].tolist() == expected
        assert values[at].tolist() == [line[token] for token in expected]
    assert finite.all()
    logits[3, 29], logits[5, 0] = torch.inf, torch.nan
    assert top_of(logits, k)[2].tolist() == [at not in (3, 5) for at in range(40)]
