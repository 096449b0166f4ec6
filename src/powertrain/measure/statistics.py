"""Fidelity statistics of one model against another, token by token, with paired bootstrap intervals over windows.

Both models score the same tokens, so every resample of the windows moves both at once: the interval is of the
difference. Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 1979 (percentile intervals).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]

KL_QUANTILES = {"kl_p50": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}
ROWS_AT_ONCE = 64
"""Positions reduced together: bounds the working memory to a few times this many rows of logits."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One number per scored token, float64 [num_tokens].

    kl: KL(reference || candidate) of the next-token distributions, in nats. nll_reference, nll_candidate: negative
    log-probability of the true token, in nats. agrees: 1 where both rank the same token first. delta_p: change of the
    true token's probability, candidate minus reference.
    """

    kl: Floats
    nll_reference: Floats
    nll_candidate: Floats
    agrees: Floats
    delta_p: Floats

    def __len__(self) -> int:
        return len(self.kl)


@dataclass(frozen=True, slots=True)
class Summary:
    """Point values and 95 % intervals by name; a name has no interval where there is only one window."""

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def compare_logits(reference: torch.Tensor, candidate: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Score the predictions of `targets` (int64 [T]) by two models' logits (float [T, vocab]).

    Distributions in float32, sums over the vocabulary in float64, `ROWS_AT_ONCE` rows at a time.
    """
    parts: list[list[torch.Tensor]] = [[] for _ in fields(TokenScores)]
    for rows in _row_slices(len(targets)):
        log_p = torch.log_softmax(reference[rows].float(), dim=-1)
        log_q = torch.log_softmax(candidate[rows].float().to(log_p.device), dim=-1)
        target = targets[rows].to(log_p.device).unsqueeze(1)
        true_p = log_p.gather(1, target).squeeze(1).double()
        true_q = log_q.gather(1, target).squeeze(1).double()
        agrees = (log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).double()
        # A logit of -inf (a masked token) has p = 0 and adds nothing, whatever the candidate gives it.
        terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
        kl = terms.sum(dim=-1, dtype=torch.float64).clamp_(min=0.0)
        for part, values in zip(parts, (kl, -true_p, -true_q, agrees, true_q.exp() - true_p.exp()), strict=True):
            part.append(values.cpu())
    return TokenScores(*(torch.cat(part).numpy() for part in parts))


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> Floats:
    """Negative log-probability in nats of `targets` (int64 [T]) under `logits` (float [T, vocab]); float64 [T]."""
    parts = []
    for rows in _row_slices(len(targets)):
        log_p = torch.log_softmax(logits[rows].float(), dim=-1)
        parts.append(-log_p.gather(1, targets[rows].to(log_p.device).unsqueeze(1)).squeeze(1).double().cpu())
    return torch.cat(parts).numpy()


def _row_slices(num_rows: int) -> Iterator[slice]:
    return (slice(begin, begin + ROWS_AT_ONCE) for begin in range(0, num_rows, ROWS_AT_ONCE))


def summarize(windows: list[TokenScores], num_resamples: int = 1000, seed: int = 0) -> Summary:
    """All statistics over all tokens, each with a 95 % bootstrap interval from `num_resamples` draws of the windows."""
    kl = np.concatenate([scores.kl for scores in windows])
    order = np.argsort(kl, kind="stable")
    sorted_kl = kl[order]
    window_of = np.repeat(np.arange(len(windows)), [len(scores) for scores in windows])[order]
    sums = np.array([_sums(scores) for scores in windows])

    def statistics(counts: Floats) -> Iterator[dict[str, float]]:
        for row, total in zip(counts, counts @ sums, strict=True):
            yield _means(total) | _quantiles(sorted_kl, np.cumsum(row[window_of]))

    values = next(statistics(np.ones((1, len(windows)))))
    return Summary(values, _intervals(statistics(_resamples(len(windows), num_resamples, seed)), len(windows)))


def summarize_perplexity(windows: list[Floats], num_resamples: int = 1000, seed: int = 0) -> Summary:
    """`ppl` = exp(mean nll) over all tokens of `windows`, with its 95 % bootstrap interval over windows."""
    sums = np.array([[len(nll), nll.sum()] for nll in windows])

    def statistics(counts: Floats) -> Iterator[dict[str, float]]:
        return ({"ppl": _exp(total / count)} for count, total in counts @ sums)

    values = next(statistics(np.ones((1, len(windows)))))
    return Summary(values, _intervals(statistics(_resamples(len(windows), num_resamples, seed)), len(windows)))


def summarize_items(columns: Mapping[str, Floats], num_resamples: int = 1000, seed: int = 0) -> Summary:
    """The mean of each column, one number per item, with its 95 % bootstrap interval over items.

    A draw takes the same items of every column, so the interval of a column of differences is a paired one.
    """
    table = np.stack(list(columns.values()), axis=1).astype(np.float64)
    num_items = len(table)

    def statistics(counts: Floats) -> Iterator[dict[str, float]]:
        return (dict(zip(columns, map(float, row), strict=True)) for row in counts @ table / num_items)

    values = next(statistics(np.ones((1, num_items))))
    return Summary(values, _intervals(statistics(_resamples(num_items, num_resamples, seed)), num_items))


def summarize_ratios(pairs: Mapping[str, tuple[Floats, Floats]], num_resamples: int = 1000, seed: int = 0) -> Summary:
    """Sum of the first column over sum of the second, each [items], with its 95 % bootstrap interval over items."""
    above = np.stack([pair[0] for pair in pairs.values()], axis=1)
    below = np.stack([pair[1] for pair in pairs.values()], axis=1)

    def statistics(counts: Floats) -> Iterator[dict[str, float]]:
        return (dict(zip(pairs, map(float, row), strict=True)) for row in (counts @ above) / (counts @ below))

    values = next(statistics(np.ones((1, len(above)))))
    return Summary(values, _intervals(statistics(_resamples(len(above), num_resamples, seed)), len(above)))


def _resamples(num_windows: int, num_resamples: int, seed: int) -> Floats:
    """How often each draw with replacement takes each window: [num_resamples, num_windows]."""
    generator = np.random.default_rng(seed)
    shares = np.full(num_windows, 1.0 / num_windows)
    return generator.multinomial(num_windows, shares, size=num_resamples).astype(np.float64)


def _intervals(draws: Iterator[dict[str, float]], num_windows: int) -> dict[str, tuple[float, float]]:
    if num_windows < 2:
        return {}
    rows = list(draws)
    bounds = {name: np.percentile([row[name] for row in rows], (2.5, 97.5)) for name in rows[0]}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def _sums(scores: TokenScores) -> list[float]:
    return [
        float(len(scores)),
        float(scores.kl.sum()),
        float(scores.nll_reference.sum()),
        float(scores.nll_candidate.sum()),
        float(scores.agrees.sum()),
        float(np.square(scores.delta_p).sum()),
    ]


def _means(sums: Floats) -> dict[str, float]:
    count, kl, nll_reference, nll_candidate, agrees, squared_dp = (float(value) for value in sums)
    return {
        "kl_mean": kl / count,
        "top1_agreement": agrees / count,
        "rms_dp": float(np.sqrt(squared_dp / count)),
        "ppl_reference": _exp(nll_reference / count),
        "ppl_candidate": _exp(nll_candidate / count),
        "ppl_ratio": _exp((nll_candidate - nll_reference) / count),
    }


def _exp(mean_nll: float) -> float:
    # A broken candidate may lose hundreds of nats per token: the largest float, not an overflow, says so in JSON.
    return float(np.exp(min(mean_nll, 700.0)))


def _quantiles(sorted_kl: Floats, cumulative: Floats) -> dict[str, float]:
    """The smallest KL at or below which at least the given share of the (weighted) tokens lies."""
    total = cumulative[-1]
    found = np.searchsorted(cumulative, [share * total for share in KL_QUANTILES.values()], side="left")
    return {name: float(sorted_kl[index]) for name, index in zip(KL_QUANTILES, found, strict=True)}
