"""How far one model is from another: KL divergence, agreement and perplexity on the same tokens, with intervals.

Both models are read from disk and run by the engine's own decoder, so a bad file or a bad kernel shows here.
KL(reference || candidate) per token follows llama.cpp's statistics; perplexity follows the non-overlapping windows of
the Hugging Face guide (no context before a window's first token).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from powertrain.measure.scoring import (
    SELF,
    Data,
    Model,
    Progress,
    check_same_vocabulary,
    data_name,
    data_windows,
    predictions,
    read_model,
    targets,
)
from powertrain.measure.statistics import (
    Summary,
    TokenScores,
    compare_logits,
    summarize,
    summarize_perplexity,
    token_nll,
)
from powertrain.text_data import token_sha256
from powertrain.types import PowertrainError

DEFAULT_WINDOW = 512
DEFAULT_NUM_TOKENS = 16384
CACHE_BYTES = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Fidelity of a candidate. KL in nats per token, `rms_dp` a probability, `ppl_ratio` candidate over reference.

    `intervals` maps each statistic's name to its paired 95 % bootstrap interval over windows (none with one window).
    `kl_windows` is the mean of each window: two candidates judged on the same ones can be compared in pairs.
    `num_tokens` counts scored tokens; `data_sha256` is of their ids. `bytes` and `bits_per_weight` are the candidate's
    stored tensors, the latter over the weights of the reference.
    """

    kl_mean: float
    kl_p50: float
    kl_p90: float
    kl_p99: float
    kl_p999: float
    top1_agreement: float
    rms_dp: float
    ppl_reference: float
    ppl_candidate: float
    ppl_ratio: float
    intervals: Mapping[str, tuple[float, float]]
    kl_windows: tuple[float, ...]
    bits_per_weight: float
    bytes: int
    num_tokens: int
    num_windows: int
    data_sha256: str
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: schema 1, kind `evaluation`; every interval as `[low, high]` under its statistic's name."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["intervals"] = {name: list(bounds) for name, bounds in self.intervals.items()}
        values["kl_windows"] = list(self.kl_windows)
        return {"schema": 1, "kind": "evaluation", **values, "settings": dict(self.settings)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """exp(mean negative log-likelihood) of a text, with a 95 % bootstrap interval over windows (None with one)."""

    ppl: float
    interval: tuple[float, float] | None
    num_tokens: int
    num_windows: int
    data_sha256: str
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: schema 1, kind `perplexity`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["interval"] = None if self.interval is None else list(self.interval)
        return {"schema": 1, "kind": "perplexity", **values, "settings": dict(self.settings)}


def evaluate(
    candidate: str | Path,
    reference: str | Path | Reference,
    *,
    data: Data = SELF,
    num_tokens: int | None = DEFAULT_NUM_TOKENS,
    window: int = DEFAULT_WINDOW,
    chunk: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    kv_cache_dtype: str = "auto",
    num_resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the checkpoint `candidate` with `reference`, both read from disk, on the same tokens.

    `data` is "self" (text sampled from the reference), a file of text or JSON lines, or sequences of token ids. About
    `num_tokens` of it (None: all) are scored in windows of `window`. The reference runs in float32 on the reference
    kernels; the candidate with `dtype`, `kernels` and `kv_cache_dtype`, as the engine would serve it. A small `chunk`
    scores few rows at a time, through the products that decoding uses. To compare several candidates, build one
    `Reference` and pass it: its data and logits are kept (its own `data`, `num_tokens`, `window` and `seed` then hold).
    Raises `PowertrainError` for unreadable data, another vocabulary, a window beyond the model's length, or a candidate
    that gives no finite numbers.
    """
    if not isinstance(reference, Reference):
        reference = Reference(
            reference, data=data, num_tokens=num_tokens, window=window, device=device, seed=seed, progress=progress
        )
    model = read_model(candidate, device=device, dtype=dtype, kernels=kernels, kv_cache_dtype=kv_cache_dtype)
    return reference.compare(model, chunk=chunk, num_resamples=num_resamples, progress=progress)


@dataclass
class _LogitCache:
    """Logits of the first windows asked for, until the budget is spent: the rest is computed again each time."""

    max_bytes: int
    _logits: dict[int, torch.Tensor] = field(default_factory=dict)
    _nbytes: int = 0

    def get(self, index: int, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if index in self._logits:
            return self._logits[index]
        logits = compute()
        if self._nbytes + logits.nbytes <= self.max_bytes:
            self._logits[index] = logits
            self._nbytes += logits.nbytes
        return logits


class Reference:
    """A reference model, the windows of tokens to compare on, and as many of its logits as `cache_bytes` hold."""

    def __init__(
        self,
        model: str | Path | Model,
        *,
        data: Data = SELF,
        num_tokens: int | None = DEFAULT_NUM_TOKENS,
        window: int = DEFAULT_WINDOW,
        device: str = "auto",
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
        progress: Progress | None = None,
    ) -> None:
        self.model = model if isinstance(model, Model) else read_model(model, device=device, dtype="float32")
        self._seed = seed
        self._data = data_name(data)
        self.windows = data_windows(self.model, data, num_tokens, window, seed=seed, progress=progress)
        self.data_sha256 = token_sha256(self.windows)
        self._cache = _LogitCache(cache_bytes)

    def compare(
        self,
        candidate: Model,
        *,
        chunk: int | None = None,
        num_resamples: int = 1000,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Score `candidate` on every window against this reference. Raises what `evaluate` raises."""
        started = time.perf_counter()
        reference = self.model
        check_same_vocabulary(candidate, reference)
        scores = []
        for index in range(len(self.windows)):
            scores.append(self._compare_window(index, candidate, chunk))
            if progress is not None:
                progress(f"evaluate {candidate.name}", index + 1, len(self.windows))
        summary = summarize(scores, num_resamples, self._seed)
        return Evaluation(
            **summary.values,
            intervals=summary.intervals,
            kl_windows=tuple(float(part.kl.mean()) for part in scores),
            bits_per_weight=8 * candidate.nbytes / reference.num_parameters,
            bytes=candidate.nbytes,
            num_tokens=sum(len(part) for part in scores),
            num_windows=len(scores),
            data_sha256=self.data_sha256,
            settings={
                "candidate": candidate.name,
                "reference": reference.name,
                "data": self._data,
                "seed": self._seed,
                "window": max(len(window.token_ids) for window in self.windows),
                "chunk": chunk,
                "device": candidate.device,
                "dtype": candidate.dtype,
                "kernels": candidate.kernels,
                "kv_cache_dtype": candidate.kv_cache_dtype,
                "reference_dtype": reference.dtype,
                "num_resamples": num_resamples,
                "seconds": round(time.perf_counter() - started, 3),
            },
        )

    def _compare_window(self, index: int, candidate: Model, chunk: int | None) -> TokenScores:
        window = self.windows[index]
        expected = self._cache.get(index, lambda: predictions(self.model, window, None))
        scores = compare_logits(expected, predictions(candidate, window, chunk), targets(window))
        if not math.isfinite(float(scores.kl.sum() + scores.nll_candidate.sum() + scores.nll_reference.sum())):
            raise PowertrainError(f"{candidate.name}: no finite probabilities on window {index}: it is broken")
        return scores


def perplexity(
    model: str | Path,
    data: Data,
    *,
    window: int = 2048,
    stride: int | None = None,
    num_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    num_resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a text file (or token ids) under one checkpoint: every token once, in windows of `window`.

    The first token of a window is not predicted; a `stride` below `window` gives the others more context. `num_tokens`
    limits it to that many, evenly spread. Raises what `evaluate` raises.
    """
    judge = read_model(model, device=device, dtype=dtype)
    windows = data_windows(judge, data, num_tokens, window, stride=stride, seed=seed, progress=progress)
    nlls = []
    for index, part in enumerate(windows):
        nlls.append(token_nll(predictions(judge, part, None), targets(part)))
        if progress is not None:
            progress(f"perplexity {judge.name}", index + 1, len(windows))
    summary: Summary = summarize_perplexity(nlls, num_resamples, seed)
    return Perplexity(
        ppl=summary.values["ppl"],
        interval=summary.intervals.get("ppl"),
        num_tokens=sum(map(len, nlls)),
        num_windows=len(windows),
        data_sha256=token_sha256(windows),
        settings={
            "model": judge.name,
            "data": data_name(data),
            "window": window,
            "stride": stride or window,
            "device": judge.device,
            "dtype": judge.dtype,
        },
    )
