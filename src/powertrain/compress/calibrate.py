"""Calibration: the tokens whose activations the methods look at, and the proof that they are not what will judge.

Windows of one length, drawn at random places of the given text. The text must not be what a later evaluation
scores; `NgramFilter` remembers enough of it to tell.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from powertrain.checkpoint.source import Checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.text_data import encode_texts, read_texts
from powertrain.types import ModelFileError, PowertrainError

NUM_SAMPLES, LENGTH = 128, 512

NGRAM = 13
"""Tokens in a row that two texts do not share by chance (Brown et al. 2020, arXiv 2005.14165, appendix C)."""

NGRAM_FILE = "calibration_ngrams.npy"
MAX_HASHES = 1 << 17
"""A mebibyte, and all of 256 windows of 512 tokens."""

CalibrationData = str | Path | Sequence[str | Path] | Sequence[Sequence[int]]
"""A file of text or JSON lines, several to be mixed in equal parts, or sequences of token ids."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """token_ids: int64 [samples, tokens]. `source` names the files; `sha256` is of the ids."""

    token_ids: torch.Tensor
    source: str
    sha256: str

    @classmethod
    def of(cls, token_ids: torch.Tensor, source: str) -> CalibrationSet:
        digest = hashlib.sha256(token_ids.numpy().astype("<i4").tobytes()).hexdigest()
        return cls(token_ids, source, digest)

    def to_dict(self) -> dict[str, str | int]:
        samples, length = self.token_ids.shape
        return {"source": self.source, "sha256": self.sha256, "num_samples": samples, "length": length}


def calibration_set(
    data: CalibrationData,
    checkpoint: Checkpoint,
    *,
    num_samples: int = NUM_SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
) -> CalibrationSet:
    """Windows of `length` tokens of `data` in the ids of the checkpoint's tokenizer.

    Raises `PowertrainError` for an unreadable file, ids beyond the vocabulary, a length beyond the model's, or less
    text than one window.
    """
    limit = int(checkpoint.config.get("max_position_embeddings") or length)
    if num_samples < 1 or not 2 <= length <= limit:
        raise PowertrainError(f"calibration wants samples of 2 to {limit} tokens, got {num_samples} of {length}")
    parts = [data] if isinstance(data, str | Path) else list(data)
    files = [part for part in parts if isinstance(part, str | Path)]
    if files:
        tokenizer = load_tokenizer(checkpoint.path)
        runs: list[Sequence[int]] = [encode_texts(read_texts(file), tokenizer) for file in files]
        source = ", ".join(Path(file).name for file in files)
    else:
        runs, source = [ids for ids in parts if not isinstance(ids, str | Path)], "token ids"
    runs = [ids for ids in runs if len(ids) >= length]
    if not runs:
        raise PowertrainError(f"calibration: {source}: no text of {length} tokens; give more, or a smaller length")
    vocab_size = int(checkpoint.config["vocab_size"])
    if not all(0 <= token < vocab_size for ids in runs for token in ids):
        raise PowertrainError(f"calibration: {source}: token ids must be in 0..{vocab_size - 1}")
    return CalibrationSet.of(torch.tensor(_windows(runs, num_samples, length, random.Random(seed))), source)


def _windows(runs: Sequence[Sequence[int]], num: int, length: int, source: random.Random) -> list[Sequence[int]]:
    """Each run gives every so-manieth window, wherever in it; runs that are one window whole are taken once."""
    if all(len(ids) == length for ids in runs):
        return [runs[at] for at in sorted(source.sample(range(len(runs)), min(num, len(runs))))]
    windows = []
    for at in range(num):
        ids = runs[at % len(runs)]
        begin = source.randrange(len(ids) - length + 1)
        windows.append(ids[begin : begin + length])
    return windows


class NgramFilter:
    """Which 13-grams a text holds, as 64-bit hashes; a false alarm needs an equal hash, one in 10^13 for a book.

    Of a text with more than `MAX_HASHES` the lowest are kept, an even sample.
    """

    def __init__(self, sequences: Sequence[Sequence[int]] | torch.Tensor) -> None:
        found = np.unique(_hashes_of(sequences))
        self.hashes = found[:MAX_HASHES]

    def num_shared(self, sequences: Sequence[Sequence[int]]) -> int:
        """How many of the 13-grams of other sequences are in this text, as far as its hashes were kept."""
        return int(np.isin(_hashes_of(sequences), self.hashes).sum())

    def files(self) -> dict[str, bytes | str]:
        """The hashes as a file of a compressed folder: the text itself cannot be told from them."""
        content = io.BytesIO()
        np.save(content, self.hashes.astype("<u8"), allow_pickle=False)
        return {NGRAM_FILE: content.getvalue()}

    @classmethod
    def of_folder(cls, folder: str | Path) -> NgramFilter | None:
        """What `files` put into a compressed folder; None where it holds none. Raises `ModelFileError` if damaged."""
        file = Path(folder) / NGRAM_FILE
        if not file.is_file():
            return None
        try:
            hashes = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ModelFileError(f"{file}: not readable: {error}") from None
        if hashes.dtype != np.uint64 or hashes.ndim != 1 or len(hashes) > MAX_HASHES:
            raise ModelFileError(f"{file}: holds no hashes of runs of {NGRAM} tokens")
        made = cls([])
        made.hashes = hashes
        return made


def ngram_files(calibration: CalibrationSet | None) -> dict[str, bytes | str]:
    """What a compressed folder keeps of its calibration text, so that no evaluation scores it by mistake."""
    return {} if calibration is None else NgramFilter(calibration.token_ids).files()


def _hashes_of(sequences: Sequence[Sequence[int]] | torch.Tensor) -> np.ndarray:
    parts = [_ngram_hashes(np.asarray(ids, dtype=np.int64)) for ids in sequences]
    return np.concatenate([np.empty(0, dtype=np.uint64), *parts])


def _ngram_hashes(token_ids: np.ndarray) -> np.ndarray:
    """One hash for each run of 13 ids, uint64: a polynomial of the ids, mixed."""
    if len(token_ids) < NGRAM:
        return np.empty(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(token_ids.astype(np.uint64) + np.uint64(1), NGRAM)
    total = np.zeros(len(windows), dtype=np.uint64)
    for at in range(NGRAM):  # wraps around at 2^64, as is wanted
        total = (total ^ windows[:, at]) * np.uint64(0x9E3779B97F4A7C15)
        total ^= total >> np.uint64(29)
    return total
