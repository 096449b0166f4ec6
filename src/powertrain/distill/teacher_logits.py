"""A teacher's distributions stored once, so that it need not be in memory while a student learns from them.

Of each position the `k` likeliest tokens with their log-probabilities, and the mass of all others as one bucket: what
the student gives those tokens is compared with it as a sum, so that its tail is held to the right size though not to a
shape. The divergence of the buckets is never more than that of the distributions (data processing inequality).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional

from powertrain.checkpoint.safetensors_folder import read_header, read_json, sync
from powertrain.checkpoint.unfinished import under_way
from powertrain.compress.plain_model import POSITIONS_AT_ONCE, PlainModel
from powertrain.distill.batches import Batch, tokens_sha256
from powertrain.distill.losses import Divergence, divergence_of
from powertrain.distill.teachers import View, counted
from powertrain.types import ModelFileError, PowertrainError

INDEX_FILE = "teacher_logits.json"
WINDOWS_PER_SHARD = 256
LEAST_LOG_TAIL = -30.0
"""Nats: where the stored tokens hold all of the mass, in float32, their complement is as good as nothing."""

Progress = Callable[[str, float, float | None], None]


@torch.no_grad()
def store_teacher_logits(
    teacher: PlainModel,
    windows: torch.Tensor,
    folder: Path,
    *,
    k: int = 64,
    teacher_sha256: str = "",
    windows_per_shard: int = WINDOWS_PER_SHARD,
    part: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> StoredTeacher:
    """Write the teacher's top `k` over windows, int64 [n, length], as shards in `folder`; those already there stay.

    A position takes 6 k + 4 bytes. `part`: (0, 2) and (1, 2) are two halves of the work, which may be done at the same
    time; all is there when both are. Raises `PowertrainError` for a folder of other windows, or a full disk.
    """
    if not 1 <= k < teacher.config.vocab_size:
        raise PowertrainError(f"k must be 1 to {teacher.config.vocab_size - 1}, got {k}")
    index = {
        "schema": 1,
        "windows_sha256": tokens_sha256(windows),
        "teacher_sha256": teacher_sha256,
        "num_windows": len(windows),
        "length": windows.shape[1],
        "k": k,
        "windows_per_shard": windows_per_shard,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / INDEX_FILE).is_file():
            _write(folder / INDEX_FILE, lambda file: file.write_text(json.dumps(index, indent=1) + "\n"))
        StoredTeacher(folder, device=teacher.embedding.device).check(index)
        for number, begin in list(enumerate(range(0, len(windows), windows_per_shard)))[part[0] :: part[1]]:
            file = _shard(folder, number)
            if not file.is_file():
                tensors = _top(teacher, windows[begin : begin + windows_per_shard], k)
                _write(file, lambda path, tensors=tensors: save_file(tensors, path))  # type: ignore[misc]
            if progress is not None:
                progress("store teacher logits", min(begin + windows_per_shard, len(windows)), len(windows))
    except (OSError, SafetensorError) as error:
        raise PowertrainError(f"cannot store teacher logits in {folder}: {error}") from error
    return StoredTeacher(folder, device=teacher.embedding.device)


def _top(teacher: PlainModel, windows: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """ids int32 and log_p float16 [n, length, k], log_tail float32 [n, length]."""
    parts: list[tuple[torch.Tensor, ...]] = []
    for window in windows:
        hidden = teacher.hidden(window.unsqueeze(0).to(teacher.embedding.device))[0]
        rows = []
        for some in torch.split(hidden, POSITIONS_AT_ONCE):
            log_p = torch.log_softmax(functional.linear(some, teacher.head), dim=-1, dtype=torch.float32)
            top = log_p.topk(k, dim=-1)
            rows.append((top.indices.int(), top.values.half(), log_complement(top.values.half().float())))
        parts.append(tuple(torch.cat(part) for part in zip(*rows, strict=True)))
    names = ("ids", "log_p", "log_tail")
    return {name: torch.stack(part).cpu() for name, part in zip(names, zip(*parts, strict=True), strict=True)}


def log_complement(log_p: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of exp(log_p)) over the last axis, no less than -30."""
    inside = log_p.logsumexp(-1).clamp(max=0.0)
    return torch.log((-torch.expm1(inside)).clamp_min(math.exp(LEAST_LOG_TAIL)))


class StoredTeacher:
    """Stored distributions as a `Teacher`: a batch's `keys` say which windows it holds. They have no streams."""

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu") -> None:
        self._folder, self._device = folder, device
        self._index = read_json(folder / INDEX_FILE)
        self._shards: dict[int, dict[str, torch.Tensor]] = {}

    def check(self, index: dict[str, Any]) -> None:
        """Raises `PowertrainError` naming the first entry in which the folder is another one's."""
        for key, value in index.items():
            if self._index.get(key) != value:
                raise PowertrainError(
                    f"{self._folder}: holds logits with another {key} ({self._index.get(key)!r}, now {value!r}): "
                    "choose another folder, or remove it"
                )

    def look(self, batch: Batch, streams: Collection[int] = (), *, is_training: bool = True) -> View:
        """Raises `PowertrainError` for streams, for windows that are not stored, and for a temperature other than 1."""
        if streams:
            raise PowertrainError("stored teacher logits hold no streams: leave the hidden loss out")
        ids, log_p, log_tail = (part.to(self._device) for part in self._rows(batch))
        log_buckets = torch.cat((log_p.float(), log_tail.unsqueeze(-1)), dim=-1)
        ids, log_buckets = counted(ids.long(), batch), counted(log_buckets, batch)

        def compare(rows: slice, logits: torch.Tensor, divergence: Divergence) -> torch.Tensor:
            if divergence.temperature != 1.0:
                raise PowertrainError("stored teacher logits are of temperature 1: leave the temperature at that")
            return divergence_of(log_buckets[rows], in_buckets(logits, ids[rows]), divergence)

        return View(compare, {})

    def _rows(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if batch.keys is None:
            raise PowertrainError("these batches do not say which stored windows they hold")
        per_shard = int(self._index["windows_per_shard"])
        found = []
        for key in batch.keys:
            if not 0 <= key < self._index["num_windows"]:
                raise PowertrainError(
                    f"{self._folder}: window {key} is not stored; it holds {self._index['num_windows']}"
                )
            tensors = self._load(key // per_shard)
            found.append([tensors[name][key % per_shard] for name in ("ids", "log_p", "log_tail")])
        ids, log_p, log_tail = (torch.stack(part) for part in zip(*found, strict=True))
        return ids, log_p, log_tail

    def _load(self, number: int) -> dict[str, torch.Tensor]:
        """A shard, kept once it was read."""
        if number not in self._shards:
            file = _shard(self._folder, number)
            try:
                read_header(file)
                self._shards[number] = load_file(file)
            except (SafetensorError, OSError) as error:
                raise ModelFileError(f"{file}: cannot be read: {error}") from None
        return self._shards[number]


def in_buckets(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities float32 [rows, k + 1] of the tokens ids, int64 [rows, k], and of all others together."""
    log_q = torch.log_softmax(logits, dim=-1, dtype=torch.float32).gather(1, ids)
    return torch.cat((log_q, log_complement(log_q).unsqueeze(-1)), dim=-1)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"logits-{number:05d}.safetensors"


def _write(file: Path, write: Callable[[Path], object]) -> None:
    """Through a file beside it, so that what is there is whole."""
    with under_way(file) as partial:
        write(partial)
        sync(partial)
        partial.replace(file)
