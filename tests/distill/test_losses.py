"""Divergences against their definitions in float64; losses by chunks against autograd on all logits at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.distill.losses import Divergence, Kind, mean_by_chunks, stream_loss, token_loss
from powertrain.types import PowertrainError

KINDS: tuple[Kind, ...] = ("forward-kl", "reverse-kl", "jsd")


def textbook(student: torch.Tensor, teacher: torch.Tensor, divergence: Divergence) -> torch.Tensor:
    p = (teacher.double() / divergence.temperature).softmax(-1)
    q = (student.double() / divergence.temperature).softmax(-1)
    m = divergence.beta * p + (1 - divergence.beta) * q

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one * (one / other).log()).sum(-1)

    by_kind = {
        "forward-kl": kl(p, q),
        "reverse-kl": kl(q, p),
        "jsd": divergence.beta * kl(p, m) + (1 - divergence.beta) * kl(q, m),
    }
    return by_kind[divergence.kind] * divergence.temperature**2


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    temperature=st.floats(0.25, 4.0),
    beta=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31),
)
def test_losses_are_the_textbooks(kind: Kind, temperature: float, beta: float, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(5, 17, generator=source) for _ in range(2))
    divergence = Divergence(kind, temperature, beta)
    found = token_loss(student, teacher, divergence)
    torch.testing.assert_close(found.double(), textbook(student, teacher, divergence), rtol=1e-4, atol=1e-5)
    assert bool((token_loss(teacher, teacher, divergence).abs() < 1e-5).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_chunks_give_the_loss_and_gradients_of_the_whole(kind: Kind, at_once: int) -> None:
    source = torch.Generator().manual_seed(0)
    hidden, target = (torch.randn(11, 8, generator=source, dtype=torch.float64) for _ in range(2))
    head, other_head = (torch.randn(30, 8, generator=source, dtype=torch.float64) for _ in range(2))
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    whole = textbook(leaves[0] @ leaves[1].t(), target @ other_head.t(), Divergence(kind)).mean()
    expected = torch.autograd.grad(3 * whole, leaves)

    hidden.requires_grad_(), head.requires_grad_()

    def score(rows: slice, logits: torch.Tensor) -> torch.Tensor:
        return token_loss(logits, target[rows] @ other_head.t(), Divergence(kind))

    loss = mean_by_chunks(hidden, head, score, at_once)
    (3 * loss).backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.grad, expected[1], rtol=1e-4, atol=1e-6)


def test_no_gradient_is_asked_for_where_none_is_wanted() -> None:
    loss = mean_by_chunks(torch.randn(5, 4), torch.randn(9, 4), lambda rows, logits: logits.logsumexp(-1), 2)
    assert not loss.requires_grad


def test_the_stream_loss_is_relative_to_each_position() -> None:
    teacher = torch.randn(2, 3, 8)
    size = torch.tensor([1.0, 1000.0, 0.001]).view(1, 3, 1)
    assert float(stream_loss(1.1 * teacher * size, teacher * size)) == pytest.approx(0.01, rel=1e-3)


def test_senseless_settings_are_refused_by_name() -> None:
    for settings_, name in (
        ({"kind": "kl"}, "forward-kl"),
        ({"temperature": 0.0}, "temperature"),
        ({"beta": 1.0}, "beta"),
    ):
        with pytest.raises(PowertrainError, match=name):
            Divergence(**settings_)  # type: ignore[arg-type]
