"""How far each contender's next-token distributions are from those of the float32 weights, on the same token ids."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.contender import Worker

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.measure.statistics import TokenScores, compare_logits, summarize
from powertrain.text_data import Window, encode_texts, read_texts, spread, token_sha256, windows_of

SHOWN = ("kl_mean", "kl_p99", "top1_agreement", "ppl_candidate", "ppl_reference")


def text_windows(source: Path, text: Path, window: int, num_tokens: int) -> list[Window]:
    """Evenly spaced windows of the text in the ids of the model, each scored in a fresh context."""
    return spread(windows_of(encode_texts(read_texts(text), load_tokenizer(source)), window), num_tokens)


def measure_fidelity(source: Path, windows: Sequence[Window], workers: Sequence[Worker]) -> dict[str, Any]:
    """KL(float32 reference || contender) and top-1 agreement of each worker; one window's logits exist at a time.

    The reference is this package's own decoder in float32 over the dequantized weights of `source`.
    """
    decoder = load_model(open_checkpoint(source), "cpu", torch.float32)
    scores: dict[str, list[TokenScores]] = {worker.name: [] for worker in workers}
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "ids.npy", Path(folder) / "logits.npy"
        for number, window in enumerate(windows, 1):
            token_ids = np.array(window.token_ids[:-1], dtype=np.int64)
            np.save(ids, token_ids)
            targets = torch.tensor(window.token_ids[1:])
            reference = decoder.score(torch.from_numpy(token_ids))
            for worker in workers:
                worker.ask("logits", ids=str(ids), out=str(out))
                scores[worker.name].append(compare_logits(reference, torch.from_numpy(np.load(out)), targets))
            print(f"window {number} of {len(windows)}", flush=True)
    return {
        "num_tokens": sum(window.num_scored for window in windows),
        "num_windows": len(windows),
        "window": max(len(window.token_ids) for window in windows),
        "data_sha256": token_sha256(windows),
        "results": [_row(worker, scores[worker.name]) for worker in workers],
        "same_format": [
            _difference(one, scores[one.name], other, scores[other.name])
            for one in workers
            for other in workers
            if one.contender.is_ours and not other.contender.is_ours and one.contender.format == other.contender.format
        ],
    }


def _row(worker: Worker, scores: list[TokenScores]) -> dict[str, Any]:
    found = summarize(scores)
    row: dict[str, Any] = {"name": worker.name, "format": worker.contender.format}
    row |= {key: found.values[key] for key in SHOWN}
    return row | {"intervals": {key: found.intervals[key] for key in SHOWN if key in found.intervals}}


def _difference(own: Worker, scores: list[TokenScores], peer: Worker, others: list[TokenScores]) -> dict[str, Any]:
    """Mean KL of ours less the peer's on the same tokens, with a 95 % interval from resampled windows."""
    gaps = np.array(
        [one.kl.sum() - other.kl.sum() for one, other in zip(scores, others, strict=True)], dtype=np.float64
    )
    sizes = np.array([len(one) for one in scores], dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(gaps), (2000, len(gaps)))
    draws = gaps[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return {
        "ours": own.name,
        "peer": peer.name,
        "kl_mean_difference": float(gaps.sum() / sizes.sum()),
        "interval": [float(low), float(high)],
    }
