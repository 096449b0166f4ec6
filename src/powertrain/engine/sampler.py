"""Logits to tokens: penalties, temperature, truncation, one repeatable draw per row, log-probabilities.

Each draw uses one uniform number that depends on nothing but the sequence's seed, its index and the position: the same
request gives the same tokens whatever shares its batch, after preemption, and with or without speculation.

A row with a small top_k is drawn from its top_k + 1 largest logits alone, whether the model handed out only those or
all of them: what else the request asks for, such as log-probabilities, does not change its tokens either.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from powertrain.model.decoder import top_of
from powertrain.types import SamplingParams, TokenLogprob

_MASK64 = (1 << 64) - 1

_MAX_SHORT_TOP_K = 64
"""Above this many candidates a reduction costs as much as the logits themselves."""


@dataclass(slots=True)
class Row:
    """One row of logits: the distribution after `context` (prompt and output ids known or drafted so far)."""

    sampling: SamplingParams
    context: Sequence[int]
    num_prompt: int
    eos_token_ids: tuple[int, ...]
    seed: int
    index: int


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) from a counter, not a state: SplitMix64 (Steele et al. 2014) over the three arguments."""
    mixed = seed & _MASK64
    for part in (index, position):
        mixed = (mixed + 0x9E3779B97F4A7C15 * (part + 1)) & _MASK64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
        mixed ^= mixed >> 31
    return (mixed >> 11) * 2.0**-53


def needs_only_logits(row: Row) -> bool:
    """Whether logits and settings alone give the row's token: no penalty, no bias, no log-probabilities."""
    return row.sampling.logprobs is None and not has_penalties(row.sampling) and not _has_edits(row)


def needs_host(sampling: SamplingParams, num_output: int) -> bool:
    """Whether a row after `num_output` tokens asks for more than a device that counts its tokens can give."""
    return sampling.logprobs is not None or bool(sampling.logit_bias) or num_output < sampling.min_tokens


def has_penalties(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def num_candidates(row: Row) -> int | None:
    """How many of its largest logits are enough to draw a row's token; None where it needs all of them."""
    if not needs_only_logits(row):
        return None
    return 1 if row.sampling.is_greedy else _num_short(row.sampling)


def _num_short(sampling: SamplingParams) -> int | None:
    """One more than top_k, where that is few: the one more tells whether the cut falls between equal logits."""
    return sampling.top_k + 1 if 0 < sampling.top_k <= _MAX_SHORT_TOP_K else None


def sample_top(
    values: torch.Tensor, ids: torch.Tensor, finite: torch.Tensor, rows: Sequence[Row]
) -> tuple[list[int | None], list[int]]:
    """One token per row of `Decoder.top_logits`, each [rows, k or more] for the k that `num_candidates` wants.

    Returns the tokens, None for rows that are not finite, and the numbers of the rows that must see all their logits:
    those whose cut at top_k falls between equal ones, which all stay in.
    """
    tokens: list[int | None] = [best for best, *_ in ids.tolist()]
    is_finite = finite.tolist()
    random = [at for at, row in enumerate(rows) if is_finite[at] and not row.sampling.is_greedy]
    if random:
        values_list, ids_list = values.tolist(), ids.tolist()
        for at in random:
            tokens[at] = _draw_short(values_list[at], ids_list[at], rows[at])
    undecided = [at for at in random if tokens[at] is None]
    return [token if ok else None for token, ok in zip(tokens, is_finite, strict=True)], undecided


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Sequence[Row]) -> list[int | None]:
    """One token per row of float32 logits [rows, vocab]; None where a row holds a NaN or infinity.

    The logits are changed in place. Greedy rows take the argmax after penalties and bias.
    """
    finite = torch.isfinite(logits).all(-1).tolist()
    _select(rows, lambda row: has_penalties(row.sampling), lambda at: _penalize(logits[at], rows[at]))
    _select(rows, _has_edits, lambda at: _edit(logits[at], rows[at]))
    tokens: list[int | None] = list(logits.argmax(-1).tolist())
    random = [at for at, row in enumerate(rows) if not row.sampling.is_greedy and finite[at]]
    short = [at for at in random if _num_short(rows[at].sampling) is not None]
    undecided = set(random).difference(short)
    if short:
        k = min(max(rows[at].sampling.top_k for at in short) + 1, logits.shape[1])
        values, ids, ok = top_of(logits[short], k)
        drawn, again = sample_top(values, ids, torch.ones_like(ok), [rows[at] for at in short])
        for at, token in zip(short, drawn, strict=True):
            tokens[at] = token
        undecided.update(short[at] for at in again)
    full = sorted(undecided)
    if full:
        for at, token in zip(full, _draw(logits[full], [rows[at] for at in full]), strict=True):
            tokens[at] = token
    return [token if ok else None for token, ok in zip(tokens, finite, strict=True)]


def _select(rows: Sequence[Row], wanted: Callable[[Row], bool], apply: Callable[[int], None]) -> None:
    for at, row in enumerate(rows):
        if wanted(row):
            apply(at)


def _has_edits(row: Row) -> bool:
    return bool(row.sampling.logit_bias) or len(row.context) - row.num_prompt < row.sampling.min_tokens


def _penalize(logits: torch.Tensor, row: Row) -> None:
    """Repetition (Keskar et al. 2019, arXiv 1909.05858) over prompt and output; the additive two over the output."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.context)), device=logits.device)
        scores = logits[seen]
        factor = sampling.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / factor, scores * factor)
    output = row.context[row.num_prompt :]
    if output and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.unique(torch.tensor(output, device=logits.device), return_counts=True)
        logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts.to(logits.dtype)


def _edit(logits: torch.Tensor, row: Row) -> None:
    """Add the bias; before `min_tokens` are out, forbid every token that would end the sequence."""
    sampling = row.sampling
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
    if len(row.context) - row.num_prompt < sampling.min_tokens:
        ending = (() if sampling.ignore_eos else row.eos_token_ids) + sampling.stop_token_ids
        if ending:
            logits[torch.tensor(ending, device=logits.device)] = -torch.inf


def _draw(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """Invert the cumulative distribution of each row at its uniform number."""
    probs = _probabilities(logits, [row.sampling for row in rows]).double()
    numbers = [uniform(row.seed, row.index, len(row.context)) for row in rows]
    cumulative = probs.cumsum(-1)
    targets = torch.tensor(numbers, dtype=torch.float64, device=logits.device).unsqueeze(1) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    return [int(token) for token in chosen.clamp_(max=logits.shape[1] - 1).tolist()]


def _draw_short(values: list[float], ids: list[int], row: Row) -> int | None:
    """`_draw` of one row from its largest logits alone, largest first; None where the cut at top_k is between equals.

    In plain Python: on so few numbers a call of torch or numpy costs more than the whole loop.
    """
    sampling = row.sampling
    size = min(sampling.top_k, len(values))
    if size < len(values) and values[size] == values[size - 1]:
        return None
    temperature = max(sampling.temperature, 1e-5)
    weights = [math.exp((value - values[0]) / temperature) for value in values[:size]]
    weights = [weight for weight in weights if weight >= sampling.min_p]
    if sampling.top_p < 1.0:
        sums = list(accumulate(weights))
        last = weights[bisect_left(sums, sampling.top_p * sums[-1], hi=len(sums) - 1)]
        weights = [weight for weight in weights if weight >= last]
    by_id = sorted(zip(ids, weights, strict=False))  # as the full distribution lies
    sums = list(accumulate(weight for _, weight in by_id))
    number = uniform(row.seed, row.index, len(row.context))
    return by_id[bisect_right(sums, number * sums[-1], hi=len(sums) - 1)][0]


def _probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Temperature, then min-p (Nguyen et al. 2024, arXiv 2407.01082), top-k, top-p (Holtzman et al. 2019)."""
    column = logits.new_tensor([p.temperature for p in params]).clamp_(min=1e-5).unsqueeze(1)
    logits = logits / column
    if any(p.min_p > 0 for p in params):
        floor = logits.new_tensor([p.min_p for p in params]).unsqueeze(1).log()
        top = logits.max(-1, keepdim=True).values
        logits = logits.masked_fill(logits < top + floor, -torch.inf)
    cut = [at for at, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    if cut:
        logits[cut] = _truncate(logits[cut], [params[at] for at in cut])
    return logits.softmax(-1)


def _truncate(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Keep each row's top_k, then the fewest of those whose probabilities reach top_p. Ties at the edge stay in."""
    vocab = logits.shape[1]
    sizes = [min(p.top_k, vocab) if p.top_k > 0 else vocab for p in params]
    ordered = logits.topk(max(sizes), dim=-1).values
    at = torch.arange(ordered.shape[1], device=logits.device)
    limits = torch.tensor(sizes, device=logits.device).unsqueeze(1)
    ordered = ordered.masked_fill(at >= limits, -torch.inf)
    probs = ordered.softmax(-1)
    top_p = probs.new_tensor([p.top_p for p in params]).unsqueeze(1)
    # a token stays if those before it have not yet reached top_p: the first always does
    stays = (probs.cumsum(-1) - probs < top_p) & torch.isfinite(ordered)
    last = (stays.sum(-1, keepdim=True) - 1).clamp_(min=0)
    return logits.masked_fill(logits < ordered.gather(1, last), -torch.inf)


@torch.inference_mode()
def logprobs_of(logits: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability and rank of each row's token and of its `counts[row]` likeliest ones.

    logits: float32 [rows, vocab], as the model gave them (before penalties, bias and temperature).
    """
    table = logits.log_softmax(-1)
    own = table.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))
    ranks = ((table > own).sum(-1) + 1).tolist()
    values, ids = table.topk(max(1, *counts), dim=-1) if counts else (table[:, :0], table[:, :0])
    values_list, ids_list, own_list = values.tolist(), ids.tolist(), own.squeeze(1).tolist()
    return [
        TokenLogprob(token, own_list[at], ranks[at], tuple(ids_list[at][:count]), tuple(values_list[at][:count]))
        for at, (token, count) in enumerate(zip(token_ids, counts, strict=True))
    ]
