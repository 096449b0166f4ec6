"""Divergences of a student's next-token distributions from a teacher's, a chunk of positions at a time.

Forward KL: Hinton et al. 2015 (arXiv 1503.02531), temperature and its square included; reverse KL: Gu et al. 2023
(MiniLLM, arXiv 2306.08543); generalized Jensen-Shannon divergence: Agarwal et al. 2023 (GKD, arXiv 2306.13649).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch.nn import functional

from powertrain.compress.plain_model import POSITIONS_AT_ONCE
from powertrain.types import PowertrainError

Kind = Literal["forward-kl", "reverse-kl", "jsd"]

Score = Callable[[slice, torch.Tensor], torch.Tensor]
"""(rows, student's logits [rows, vocab]) -> a loss for each row."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence of the student Q from the teacher P. `beta`: the teacher's share in the mixture of a JSD.

    jsd: beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q. Logits are divided by `temperature` and
    the result multiplied by its square, so that gradients keep their size.
    """

    kind: Kind = "forward-kl"
    temperature: float = 1.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise PowertrainError(f"loss must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not self.temperature > 0:
            raise PowertrainError(f"temperature must be positive, got {self.temperature}")
        if not 0 < self.beta < 1:
            raise PowertrainError(f"beta must be between 0 and 1, got {self.beta}; its ends are forward and reverse KL")


FORWARD_KL = Divergence()


def token_loss(student: torch.Tensor, teacher: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """The divergence of each row, in nats: float32 [rows] of logits [rows, vocab]. Gradients reach the student's."""
    log_q, log_p = (_log_probabilities(logits, divergence.temperature) for logits in (student, teacher))
    return divergence_of(log_p, log_q, divergence) * divergence.temperature**2


def divergence_of(log_p: torch.Tensor, log_q: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    """The divergence of each row of log-probabilities [rows, outcomes], the teacher's and the student's."""
    if divergence.kind == "forward-kl":
        return _kl(log_p, log_q)
    if divergence.kind == "reverse-kl":
        return _kl(log_q, log_p)
    beta = divergence.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits if temperature == 1.0 else logits.float() / temperature
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def mean_by_chunks(
    hidden: torch.Tensor, head: torch.Tensor, score: Score, at_once: int = POSITIONS_AT_ONCE
) -> torch.Tensor:
    """The mean over rows of `score` of the logits hidden @ head^T, of which only `at_once` rows exist at a time.

    hidden: [rows, width]; head: [vocab, width]; no rows give 0. Where gradients are wanted each chunk's are taken at
    once, so that its logits can go; they are kept until the backward pass, in hidden's dtype and, for the head, in
    float32.
    """
    result: torch.Tensor = _ByChunks.apply(hidden, head, score, at_once)  # type: ignore[no-untyped-call]
    return result


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, score: Score, at_once: int) -> torch.Tensor:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_grad else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if needs_grad else None
        weight = head.detach().requires_grad_(needs_grad)
        for begin in range(0, len(hidden), at_once):
            rows = slice(begin, min(begin + at_once, len(hidden)))
            with torch.set_grad_enabled(needs_grad):
                x = hidden[rows].detach().requires_grad_(needs_grad)
                loss = score(rows, functional.linear(x, weight)).sum()
            if hidden_grad is not None and head_grad is not None:
                hidden_grad[rows], of_head = torch.autograd.grad(loss, (x, weight))
                head_grad += of_head
            total += loss.detach()
        if hidden_grad is not None and head_grad is not None:
            ctx.save_for_backward(hidden_grad, head_grad)
            ctx.head_dtype = head.dtype
        ctx.num_rows = num_rows = max(1, len(hidden))
        return total / num_rows

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        share = grads[0] / ctx.num_rows
        return (hidden_grad * share).to(hidden_grad.dtype), (head_grad * share).to(ctx.head_dtype), None, None


def stream_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over positions of ||student - teacher||^2 / ||teacher||^2, for streams [.., width]; float32.

    Relative to each position's own size: a few positions carry activations hundreds of times larger than the others.
    """
    student, teacher = student.float(), teacher.float()
    return ((student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp_min(1e-12)).mean()
