"""Where a candidate leaves its reference: each layer put into the reference alone, and all layers up to it.

Both answers are the KL divergence at the reference's own end, after its remaining layers, final norm and head. Reading
the stream through the head right after a layer instead (the logit lens, nostalgebraist 2020) says what the model would
predict if the rest of it were not there: docs/evaluation.md compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from powertrain.measure.scoring import Model, Progress, check_same_vocabulary
from powertrain.measure.statistics import ROWS_AT_ONCE
from powertrain.model.decoder import Decoder
from powertrain.text_data import Window, spread, token_sha256
from powertrain.types import PowertrainError

DEFAULT_NUM_TOKENS = 1024
"""The work grows with the square of the number of layers, the answer's precision with the root of this."""

ROWS_FOR_BASIS = 8
"""Embeddings looked at for each dimension of the stream, to find how the two models' streams are turned."""

MAX_DISTANCE = 0.5
"""Embeddings further apart than this share of their norm are not the same rounded: two bits leave 0.4."""

BAR_WIDTH = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDistance:
    """One part of the model: `embedding`, a layer by its number, or `head` with the final norm.

    error: of the candidate's stream after this part, ||x' - x|| / ||x|| by token, the mean; None for the head.
    kl_alone: nats per token at the end of the reference with this part alone taken from the candidate.
    kl_so_far: the same with this part and all before it; the last row's is the candidate's own.
    """

    part: str
    error: float | None
    kl_alone: float
    kl_so_far: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDistances:
    """All parts in the model's order. `is_turned`: the candidate's stream is a rotation of the reference's."""

    parts: Sequence[LayerDistance]
    is_turned: bool
    num_tokens: int
    num_windows: int
    data_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [{name: getattr(row, name) for name in row.__dataclass_fields__} for row in self.parts]
        own = ("is_turned", "num_tokens", "num_windows", "data_sha256")
        return {"parts": rows, **{name: getattr(self, name) for name in own}}

    def text(self) -> str:
        """A line per part for a terminal; the bars are of `kl_alone`."""
        most = max(row.kl_alone for row in self.parts) or 1.0
        lines = [f"{'part':<10} {'error':>8} {'KL so far':>10} {'KL alone':>10}"]
        for row in self.parts:
            error = "" if row.error is None else f"{row.error:.4f}"
            bar = "█" * round(BAR_WIDTH * row.kl_alone / most)
            line = f"{row.part:<10} {error:>8} {row.kl_so_far:>10.5f} {row.kl_alone:>10.5f}  {bar}"
            lines.append(line.rstrip())
        return "\n".join(lines)


def compare_layers(
    candidate: Model,
    reference: Model,
    windows: Sequence[Window],
    *,
    num_tokens: int | None = DEFAULT_NUM_TOKENS,
    progress: Progress | None = None,
) -> LayerDistances:
    """Put the candidate's parts into the reference, on about `num_tokens` of `windows` (None: all).

    Weights and the rounding of activations are the candidate's; keys and values are kept as computed. Where the stream
    of one model is a rotation of the other's, as merged rotations leave it, it is turned back at each border. Raises
    `PowertrainError` where the models' layers do not correspond, or the candidate gives no finite numbers.
    """
    check_layers_correspond(candidate, reference)
    theirs = _Parts(reference.decoder)
    turn = _turn_between(candidate, reference)
    ours = _Parts(candidate.decoder, turn)
    chosen = spread(windows, num_tokens)
    num_parts = reference.decoder.config.num_layers + 2
    sums: dict[str, list[float]] = {}
    for done, window in enumerate(chosen):
        for at, (part, *values) in enumerate(_distances(ours, theirs, window)):
            known = sums.setdefault(part, [0.0] * len(values))
            sums[part] = [total + value for total, value in zip(known, values, strict=True)]
            if progress is not None:
                progress(f"layers of {candidate.name}", done * num_parts + at + 1, len(chosen) * num_parts)
    if not all(value < float("inf") for values in sums.values() for value in values):
        raise PowertrainError(f"{candidate.name}: no finite numbers on the way through its layers: it is broken")
    scored = sum(len(window.token_ids) - window.num_context for window in chosen)
    rows = []
    for part, (error, alone, so_far) in sums.items():
        own_error = None if part == "head" else error / scored
        rows.append(LayerDistance(part=part, error=own_error, kl_alone=alone / scored, kl_so_far=so_far / scored))
    return LayerDistances(
        parts=rows,
        is_turned=turn is not None,
        num_tokens=scored,
        num_windows=len(chosen),
        data_sha256=token_sha256(chosen),
    )


def check_layers_correspond(candidate: Model, reference: Model) -> None:
    """Raises `PowertrainError` where one model's layers are not the other's one by one."""
    check_same_vocabulary(candidate, reference)
    for what, field in (("layers", "num_layers"), ("dimensions", "hidden_size")):
        own, other = (getattr(model.decoder.config, field) for model in (candidate, reference))
        if own != other:
            raise PowertrainError(
                f"--per-layer: {candidate.name} has {own} {what} and {reference.name} {other}, so that its layers are "
                "not the reference's one by one; leave the flag out"
            )


@torch.inference_mode()
def _distances(ours: _Parts, theirs: _Parts, window: Window) -> Iterator[tuple[str, float, float, float]]:
    """(part, error, KL alone, KL so far) of each part, summed over the window's scored tokens."""
    token_ids = torch.tensor(window.token_ids[:-1], dtype=torch.int64)
    scored = slice(window.num_context - 1, None)
    streams = list(theirs.streams(token_ids))
    expected = theirs.logits(streams[-1][scored]).log_softmax(dim=-1)

    def divergence(x: torch.Tensor, first: int) -> float:
        """Of the reference from its layer `first` on, at the stream x."""
        return _divergence(expected, theirs.logits(theirs.through(x, first)[scored]))

    def error(x: torch.Tensor, wanted: torch.Tensor) -> float:
        return float(((x - wanted).norm(dim=-1) / wanted.norm(dim=-1))[scored].sum(dtype=torch.float64))

    x = ours.embedded(token_ids)
    at_start = divergence(x, 0)
    yield "embedding", error(x, streams[0]), at_start, at_start
    for index, (before, after) in enumerate(pairwise(streams)):
        alone = divergence(ours.layer(index, before), index + 1)
        x = ours.layer(index, x)
        yield str(index), error(x, after), alone, divergence(x, index + 1)
    head_alone = _divergence(expected, ours.logits(streams[-1][scored]))
    yield "head", 0.0, head_alone, _divergence(expected, ours.logits(x[scored]))


def _divergence(expected: torch.Tensor, logits: torch.Tensor) -> float:
    """Sum over rows of KL(expected || softmax(logits)) in nats; expected: log-probabilities [rows, vocab]."""
    total = 0.0
    for log_p, found in zip(torch.split(expected, ROWS_AT_ONCE), torch.split(logits, ROWS_AT_ONCE), strict=True):
        terms = log_p.exp() * (log_p - found.log_softmax(dim=-1))
        total += float(terms.sum(dim=-1, dtype=torch.float64).clamp_(min=0.0).sum())
    return total


class _Parts:
    """A decoder taken apart: what goes in and comes out of each part is the reference's stream in float32.

    turn: orthogonal [hidden, hidden], the decoder's stream over the reference's, where they differ.
    """

    def __init__(self, decoder: Decoder, turn: torch.Tensor | None = None) -> None:
        self._decoder, self._turn = decoder, turn

    def embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._back(self._decoder.embedded(token_ids.to(self._decoder.device)))

    def layer(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The stream [tokens, hidden] of one sequence after a layer."""
        return self._back(self._decoder.after_block(index, self._forth(x)))

    def through(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """The stream after the layers from `first` to the last."""
        for index in range(first, self._decoder.config.num_layers):
            x = self.layer(index, x)
        return x

    def streams(self, token_ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Before the first layer, then after each."""
        x = self.embedded(token_ids)
        yield x
        for index in range(self._decoder.config.num_layers):
            x = self.layer(index, x)
            yield x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._decoder.logits(self._forth(x))

    def _forth(self, x: torch.Tensor) -> torch.Tensor:
        turned = x if self._turn is None else x @ self._turn
        return turned.to(self._decoder.device, self._decoder.dtype)

    def _back(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() if self._turn is None else x.float() @ self._turn.t()


def _turn_between(candidate: Model, reference: Model) -> torch.Tensor | None:
    """The orthogonal matrix that turns the reference's embeddings into the candidate's; None where they stay.

    The nearest one is known in closed form (Schoenemann 1966, "A generalized solution of the orthogonal Procrustes
    problem", Psychometrika 31).
    """
    config = reference.decoder.config
    num_rows = min(config.vocab_size, ROWS_FOR_BASIS * config.hidden_size)
    token_ids = torch.linspace(0, config.vocab_size - 1, num_rows).long()
    wanted, found = (_Parts(model.decoder).embedded(token_ids).double() for model in (reference, candidate))
    norm = float(wanted.norm())
    if float((found - wanted).norm()) <= MAX_DISTANCE * norm:
        return None
    left, values, right = torch.linalg.svd(wanted.t() @ found)
    turn: torch.Tensor = left @ right
    if float(values[-1]) <= 1e-6 * float(values[0]) or float((wanted @ turn - found).norm()) > MAX_DISTANCE * norm:
        raise PowertrainError(
            f"--per-layer: the embeddings of {candidate.name} are neither those of {reference.name} nor a rotation of "
            "them, so that their layers cannot be exchanged; leave the flag out"
        )
    return turn.float()
