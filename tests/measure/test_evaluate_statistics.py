"""The statistics against their definitions, and the intervals against synthetic truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from powertrain.measure.statistics import (
    TokenScores,
    compare_logits,
    summarize,
    summarize_items,
    summarize_perplexity,
    token_nll,
)


def random_logits(rows: int, vocab: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def synthetic(generator: np.random.Generator, num_windows: int, tokens: int = 20) -> list[TokenScores]:
    """Windows with their own level, so that tokens within one are correlated; true means: kl 0.5, agrees 0.8."""
    windows = []
    for _ in range(num_windows):
        level = generator.normal(0, 0.2)
        kl = 0.5 + level + generator.normal(0, 0.1, tokens)
        agrees = (generator.random(tokens) < 0.8).astype(float)
        nll = 2.0 + generator.normal(0, 1, tokens)
        windows.append(TokenScores(kl, nll, nll + 0.1 + level, agrees, generator.normal(0, 0.05, tokens)))
    return windows


def test_scores_are_what_their_definitions_say():
    reference, candidate = random_logits(150, 37, 0), random_logits(150, 37, 1)
    targets = torch.arange(150) % 37
    scores = compare_logits(reference, candidate, targets)
    p, q = (
        torch.distributions.Categorical(logits=reference.double()),
        torch.distributions.Categorical(logits=candidate.double()),
    )
    assert np.allclose(scores.kl, torch.distributions.kl_divergence(p, q), atol=1e-5)
    assert np.allclose(scores.nll_reference, -p.log_prob(targets), atol=1e-5)
    assert np.allclose(scores.nll_candidate, -q.log_prob(targets), atol=1e-5)
    assert np.allclose(scores.delta_p, q.log_prob(targets).exp() - p.log_prob(targets).exp(), atol=1e-6)
    assert scores.agrees.tolist() == (reference.argmax(1) == candidate.argmax(1)).double().tolist()
    assert np.allclose(token_nll(candidate, targets), scores.nll_candidate)


def test_a_model_is_at_no_distance_from_itself():
    logits, targets = random_logits(100, 50, 0), torch.zeros(100, dtype=torch.int64)
    scores = compare_logits(logits, logits.clone(), targets)
    assert scores.kl.tolist() == [0.0] * 100
    summary = summarize([scores, scores])
    assert summary.values["kl_mean"] == summary.values["kl_p999"] == summary.values["rms_dp"] == 0.0
    assert summary.values["top1_agreement"] == summary.values["ppl_ratio"] == 1.0
    assert summary.intervals["kl_mean"] == (0.0, 0.0)


def test_a_shift_of_all_logits_changes_nothing_and_masked_tokens_add_nothing():
    logits, targets = random_logits(70, 20, 0), torch.zeros(70, dtype=torch.int64)
    shifted = compare_logits(logits, logits + 5.0, targets)
    assert shifted.kl.max() < 1e-6
    masked = logits.clone()
    masked[:, 7] = -torch.inf
    assert np.isfinite(compare_logits(masked, logits, targets).kl).all()
    assert not np.isfinite(compare_logits(logits, masked, targets).kl).any()


def test_kl_is_in_nats_and_has_a_direction():
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = compare_logits(p, q, torch.tensor([0])).kl[0]
    assert forward == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), abs=1e-6)
    backward = compare_logits(q, p, torch.tensor([0])).kl[0]
    assert backward == pytest.approx(0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(2), abs=1e-6)


def test_quantiles_and_means_are_over_tokens_not_windows():
    generator = np.random.default_rng(0)
    windows = synthetic(generator, 5, 10) + synthetic(generator, 1, 500)
    values = summarize(windows).values
    kl = np.concatenate([scores.kl for scores in windows])
    assert values["kl_mean"] == pytest.approx(kl.mean())
    for name, share in {"kl_p50": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}.items():
        assert values[name] == np.quantile(kl, share, method="inverted_cdf")
    nll = np.concatenate([scores.nll_candidate for scores in windows])
    assert values["ppl_candidate"] == pytest.approx(np.exp(nll.mean()))
    assert values["ppl_ratio"] == pytest.approx(values["ppl_candidate"] / values["ppl_reference"])


def test_the_bootstrap_is_repeatable_and_its_seed_matters():
    windows = synthetic(np.random.default_rng(1), 12)
    assert summarize(windows, seed=3) == summarize(windows, seed=3)
    assert summarize(windows, seed=3).intervals != summarize(windows, seed=4).intervals


def test_quantile_intervals_match_a_bootstrap_written_out():
    windows = synthetic(np.random.default_rng(2), 9)
    draws = np.random.default_rng(0).multinomial(9, np.full(9, 1 / 9), size=400)
    direct = [
        np.quantile(
            np.concatenate([w.kl for w, n in zip(windows, row, strict=True) for _ in range(n)]),
            0.9,
            method="inverted_cdf",
        )
        for row in draws
    ]
    expected = np.percentile(direct, (2.5, 97.5))
    assert summarize(windows, 400, seed=0).intervals["kl_p90"] == pytest.approx(tuple(expected))


def test_intervals_contain_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(7)
    truth = {"kl_mean": 0.5, "top1_agreement": 0.8, "kl_p50": 0.5}
    hits = dict.fromkeys(truth, 0)
    for repeat in range(150):
        intervals = summarize(synthetic(generator, 40), 400, seed=repeat).intervals
        for name, value in truth.items():
            hits[name] += intervals[name][0] <= value <= intervals[name][1]
    # 95 % of 150 is 142; three standard deviations of luck and the percentile method's small optimism below that.
    assert all(count >= 128 for count in hits.values()), hits
    assert any(count < 150 for count in hits.values()), "intervals that never miss are too wide"


def test_the_paired_interval_is_narrower_than_the_models_own():
    windows = synthetic(np.random.default_rng(3), 30)
    paired = [
        TokenScores(w.kl, w.nll_reference + 1.5 * k, w.nll_candidate + 1.5 * k, w.agrees, w.delta_p)
        for k, w in zip(np.random.default_rng(4).normal(0, 1, 30), windows, strict=True)
    ]
    intervals = summarize(paired).intervals
    ratio = np.log(intervals["ppl_ratio"][1] / intervals["ppl_ratio"][0])
    own = np.log(intervals["ppl_candidate"][1] / intervals["ppl_candidate"][0])
    assert ratio < own / 3


def test_one_window_has_values_and_no_intervals():
    summary = summarize(synthetic(np.random.default_rng(5), 1))
    assert summary.intervals == {}
    assert np.isfinite(summary.values["kl_mean"])


def test_perplexity_weighs_tokens_and_survives_a_broken_model():
    summary = summarize_perplexity([np.full(10, 1.0), np.full(30, 2.0)])
    assert summary.values["ppl"] == pytest.approx(np.exp(1.75))
    low, high = summary.intervals["ppl"]
    assert low == pytest.approx(np.e)
    assert high == pytest.approx(np.exp(2))
    assert np.isfinite(summarize_perplexity([np.full(3, 1e6)]).values["ppl"])


def test_intervals_over_items_are_paired():
    generator = np.random.default_rng(0)
    before = (generator.random(2000) < 0.5).astype(float)
    moved = generator.random(2000) < 0.02
    after = np.where(moved, 1 - before, before)
    found = summarize_items({"before": before, "after": after, "difference": after - before}, 2000)
    assert found.values["difference"] == pytest.approx(after.mean() - before.mean())
    for name, column in (("before", before), ("difference", after - before)):
        low, high = found.intervals[name]
        # the bootstrap's normal limit: 1.96 standard errors each way, of the differences and not of both columns
        assert (high - low) / 2 == pytest.approx(1.96 * column.std() / np.sqrt(2000), rel=0.1)
    assert summarize_items({"one": before[:1]}).intervals == {}
