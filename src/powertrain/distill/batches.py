"""What a step trains on: a pure function of the tokens, a seed and the step's number, so that a resumed run sees the
same batches without remembering any."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from powertrain.types import PowertrainError


class Batch(NamedTuple):
    """token_ids: int64 [sequences, tokens]; is_counted: bool of that shape, positions whose predictions are trained.

    `keys`: a number for each sequence by which stored teacher logits are found, if there are any.
    """

    token_ids: torch.Tensor
    is_counted: torch.Tensor | None = None
    keys: tuple[int, ...] | None = None

    def part(self, rows: slice) -> Batch:
        """Some of the sequences."""
        is_counted = None if self.is_counted is None else self.is_counted[rows]
        return Batch(self.token_ids[rows], is_counted, None if self.keys is None else self.keys[rows])


class Batches(Protocol):
    """A source of batches. `sha256` tells one from another, with all that decides what `at` gives."""

    sha256: str

    def at(self, step: int) -> Batch:
        """The batch of a step: the same for the same number, in whatever order steps are asked for."""
        ...


class WindowBatches:
    """Windows of a run of tokens in a new order each epoch, and cut at another place each epoch."""

    def __init__(
        self, token_ids: torch.Tensor, *, length: int, batch_size: int, seed: int = 0, moves_cuts: bool = True
    ) -> None:
        """token_ids: integers [tokens]. `moves_cuts`: False keeps the windows of all epochs the same.

        Raises `PowertrainError` where there is less than one batch.
        """
        self._token_ids = token_ids
        self._length, self._batch_size, self._seed = length, batch_size, seed
        self._slack = length if moves_cuts else 0
        self.num_windows = max(0, len(token_ids) - self._slack) // length
        if self.num_windows < batch_size:
            raise PowertrainError(
                f"the training text has {len(token_ids)} tokens, too few for a batch of {batch_size} windows of "
                f"{length}; give more text, or a smaller batch or length"
            )
        self.sha256 = tokens_sha256(token_ids, f"{length} {batch_size} {seed} {moves_cuts}")
        self._epochs: dict[int, tuple[int, torch.Tensor]] = {}

    def windows(self) -> torch.Tensor:
        """All windows by key, int64 [n, length]: those of every epoch where the cuts do not move."""
        return self._token_ids[: self.num_windows * self._length].view(-1, self._length).long()

    def at(self, step: int) -> Batch:
        first = step * self._batch_size
        rows, keys = [], []
        for at in range(first, first + self._batch_size):
            offset, order = self._epoch(at // self.num_windows)
            window = int(order[at % self.num_windows])
            begin = offset + window * self._length
            rows.append(self._token_ids[begin : begin + self._length])
            keys.append(window)
        return Batch(torch.stack(rows).long(), keys=tuple(keys))

    def _epoch(self, number: int) -> tuple[int, torch.Tensor]:
        """Where the windows of an epoch begin, and their order."""
        if number not in self._epochs:
            source = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            offset = int(torch.randint(self._slack + 1, (), generator=source)) if self._slack else 0
            kept = self._epochs.get(number - 1)
            self._epochs = {} if kept is None else {number - 1: kept}
            self._epochs[number] = (offset, torch.randperm(self.num_windows, generator=source))
        return self._epochs[number]


def split_off(runs: Sequence[torch.Tensor], share: float, length: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What is left of the runs, and windows [n, length] from their ends: about `share` of each, to hold out."""
    kept, held_out = [], []
    for run in runs:
        num = int(len(run) * share) // length
        kept.append(run[: len(run) - num * length])
        held_out.append(run[len(run) - num * length :].view(-1, length))
    return kept, torch.cat(held_out).long()


def tokens_sha256(token_ids: torch.Tensor, about: str = "") -> str:
    """SHA-256 of ids as little-endian int32, and of what else decides the batches."""
    digest = hashlib.sha256(token_ids.cpu().numpy().astype("<i4").tobytes())
    digest.update(about.encode())
    return digest.hexdigest()
