"""What a student is compared with: a model that runs beside it, or its distributions as they were stored before."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import copy
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from powertrain.compress.plain_model import PlainModel, RunBlock, run_block
from powertrain.distill.batches import Batch
from powertrain.distill.losses import Divergence, token_loss

Compare = Callable[[slice, torch.Tensor, Divergence], torch.Tensor]
"""(rows, the student's logits [rows, vocab], divergence) -> float32 [rows], in nats; gradients reach the logits."""

TokenLoss = Callable[[torch.Tensor, torch.Tensor, Divergence], torch.Tensor]
"""(student's logits, teacher's logits, divergence) -> float32 [rows]."""


class View(NamedTuple):
    """What a teacher says of a batch. Rows of `compare` are the counted positions, one sequence after the other.

    streams: after the blocks that were asked for, [sequences, tokens, width].
    """

    compare: Compare
    streams: dict[int, torch.Tensor]


class Teacher(Protocol):
    """Where the targets come from."""

    def look(self, batch: Batch, streams: Collection[int] = (), *, is_training: bool = True) -> View:
        """Its view of a batch whose tensors are on its device. `is_training`: False for what is only watched."""
        ...


class LiveTeacher:
    """A frozen model in memory. `run` and `loss`, which may be compiled, serve training; evaluation runs it plain."""

    def __init__(self, model: PlainModel, *, run: RunBlock = run_block, loss: TokenLoss = token_loss) -> None:
        self.model = model
        self._training_model = copy(model)
        self._training_model.run = run
        self._loss = loss

    @torch.no_grad()
    def look(self, batch: Batch, streams: Collection[int] = (), *, is_training: bool = True) -> View:
        model, loss = (self._training_model, self._loss) if is_training else (self.model, token_loss)
        hidden, kept = model.apply(lambda whole: run_with_streams(whole, batch.token_ids, streams))
        target = counted(hidden, batch)

        def compare(rows: slice, logits: torch.Tensor, divergence: Divergence) -> torch.Tensor:
            with torch.no_grad():
                wanted = functional.linear(target[rows], model.head)
            return loss(logits, wanted, divergence)

        return View(compare, kept)


def run_with_streams(
    model: PlainModel, token_ids: torch.Tensor, wanted: Collection[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """What the head multiplies, and the streams after the blocks `wanted`."""
    kept: dict[int, torch.Tensor] = {}
    streams = model.streams(token_ids)
    x = next(streams)
    for index, x in enumerate(streams):
        if index in wanted:
            kept[index] = x
    return model.normed(x), kept


def counted(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """[rows, width] of [sequences, tokens, width]: the positions that count."""
    return values.flatten(0, 1) if batch.is_counted is None else values[batch.is_counted]
