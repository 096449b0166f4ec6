"""Stored distributions: bounded by and near to the real ones, resumed shard by shard, refused where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.plain_model import PlainModel, load_plain_model
from powertrain.distill.batches import Batch
from powertrain.distill.losses import FORWARD_KL, Divergence, divergence_of, token_loss
from powertrain.distill.teacher_logits import StoredTeacher, in_buckets, store_teacher_logits
from powertrain.distill.teachers import LiveTeacher
from powertrain.types import ModelFileError, PowertrainError

TinyModel = Callable[[str], Path]


@pytest.fixture(scope="module")
def teacher(tiny_model_dir: TinyModel) -> PlainModel:
    return load_plain_model(open_checkpoint(tiny_model_dir("llama")), "cpu", torch.float32)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(5, 300, (7, 12), generator=torch.Generator().manual_seed(0))


def divergences(
    view_of: StoredTeacher | LiveTeacher, batch: Batch, divergence: Divergence = FORWARD_KL
) -> torch.Tensor:
    student = 3 * torch.randn(batch.token_ids.numel(), 320, generator=torch.Generator().manual_seed(1))
    if batch.is_counted is not None:
        student = student[batch.is_counted.flatten()]
    return view_of.look(batch).compare(slice(0, len(student)), student, divergence)


@settings(max_examples=40, deadline=None)
@given(k=st.integers(1, 15), seed=st.integers(0, 999), size=st.floats(0.1, 8.0))
def test_buckets_bound_the_divergence_from_below_and_sum_to_one(k: int, seed: int, size: float) -> None:
    source = torch.Generator().manual_seed(seed)
    student, other = (size * torch.randn(4, 16, generator=source, dtype=torch.float64) for _ in range(2))
    ids = other.topk(k, dim=-1).indices
    buckets = [in_buckets(logits, ids) for logits in (other, student)]
    torch.testing.assert_close(buckets[0].exp().sum(-1), torch.ones(4), rtol=1e-4, atol=1e-4)
    found, whole = divergence_of(*buckets, FORWARD_KL), token_loss(student, other, FORWARD_KL)
    assert (found <= 1.001 * whole + 1e-4).all()  # the buckets are float32
    if k == 15:  # the tail is one token: nothing is lost
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_stored_targets_are_near_the_live_ones(
    teacher: PlainModel, windows: torch.Tensor, tmp_path: Path, kind: str
) -> None:
    stored = store_teacher_logits(teacher, windows, tmp_path, k=300, windows_per_shard=3)
    is_counted = torch.rand(2, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    for batch in (Batch(windows[[5, 2]], keys=(5, 2)), Batch(windows[[5, 2]], is_counted, keys=(5, 2))):
        divergence = Divergence(kind)  # type: ignore[arg-type]
        found, live = divergences(stored, batch, divergence), divergences(LiveTeacher(teacher), batch, divergence)
        # the reverse looks at the tail, where the teacher has next to nothing and 16 bits round that
        torch.testing.assert_close(found, live, rtol=0.15 if kind == "reverse-kl" else 0.02, atol=0.05)


def test_the_gradient_of_the_buckets_is_the_numerical_one() -> None:
    logits = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    log_p = torch.randn(3, 5).log_softmax(-1)
    ids = torch.tensor([[0, 3, 5, 7], [1, 2, 8, 9], [4, 5, 6, 0]])
    loss = divergence_of(log_p, in_buckets(logits, ids), FORWARD_KL).sum()
    (found,) = torch.autograd.grad(loss, logits)
    q = logits.detach().softmax(-1)
    expected = q.clone()
    p = log_p.double().exp()
    tail = torch.ones_like(q).scatter(1, ids, 0.0)
    expected -= torch.zeros_like(q).scatter(1, ids, p[:, :4])
    expected -= tail * p[:, 4:] * q / (tail * q).sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_storing_goes_on_where_it_was_cut_off(teacher: PlainModel, windows: torch.Tensor, tmp_path: Path) -> None:
    class Interrupt(Exception):
        pass

    def stop(what: str, done: float, total: float | None) -> None:
        if done == 6:
            raise Interrupt

    with pytest.raises(Interrupt):
        store_teacher_logits(teacher, windows, tmp_path, k=4, windows_per_shard=3, progress=stop)
    first = tmp_path / "logits-00000.safetensors"
    changed = first.stat().st_mtime_ns
    stored = store_teacher_logits(teacher, windows, tmp_path, k=4, windows_per_shard=3)
    assert first.stat().st_mtime_ns == changed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"logits-0000{number}.safetensors" for number in range(3)),
        "teacher_logits.json",
    ]
    assert divergences(stored, Batch(windows[6:], keys=(6,))).isfinite().all()


def test_what_does_not_fit_is_refused_by_name(teacher: PlainModel, windows: torch.Tensor, tmp_path: Path) -> None:
    stored = store_teacher_logits(teacher, windows, tmp_path, k=4)
    for bad in ({"k": 5}, {"teacher_sha256": "other"}):
        with pytest.raises(PowertrainError, match=f"another {next(iter(bad))}"):
            store_teacher_logits(teacher, windows, tmp_path, **{"k": 4, **bad})  # type: ignore[arg-type]
    with pytest.raises(PowertrainError, match="another windows_sha256"):
        store_teacher_logits(teacher, windows + 1, tmp_path, k=4)
    with pytest.raises(PowertrainError, match="k must be"):
        store_teacher_logits(teacher, windows, tmp_path / "new", k=320)
    batch = Batch(windows[:1], keys=(0,))
    with pytest.raises(PowertrainError, match="no streams"):
        stored.look(batch, {1})
    with pytest.raises(PowertrainError, match="temperature"):
        divergences(stored, batch, replace(FORWARD_KL, temperature=2.0))
    with pytest.raises(PowertrainError, match="window 7 is not stored"):
        stored.look(Batch(windows[:1], keys=(7,)))
    with pytest.raises(PowertrainError, match="which stored windows"):
        stored.look(Batch(windows[:1]))
    file = tmp_path / "logits-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelFileError, match="logits-00000"):
        StoredTeacher(tmp_path).look(batch)
