"""Batches that a model wrote: the student corrected where it would go itself.

GKD (Agarwal et al. 2023, arXiv 2306.13649): a share of the steps trains on continuations that the student has just
sampled, with the teacher's distributions at each of their positions; no gradient passes through the sampling.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from powertrain.distill.batches import Batch, Batches
from powertrain.distill.student import Student
from powertrain.types import PowertrainError

Sample = Callable[[list[list[int]], int, int], Sequence[Sequence[int]]]
"""(prompts, tokens to add, seed) -> the continuation of each prompt, which may end early. An engine, say."""

Refresh = Callable[[], Sample]
"""A `Sample` of the student as it stands when this is called; later steps of training do not change what it writes."""


class MakeRefresh(Protocol):
    """What knows an engine, which training does not."""

    def __call__(
        self, student: Student, config: Mapping[str, Any], *, device: torch.device | str, dtype: torch.dtype
    ) -> Refresh:
        """config: the student's Hugging Face config; device and dtype: those of training."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPolicy:
    """How a run samples: a `share` of its steps keep `num_prompt_tokens` of each window, and the student writes on.

    Its weights are taken anew at the first such step of every `refresh_every` steps.
    """

    share: float
    make_refresh: MakeRefresh
    num_prompt_tokens: int = 32
    refresh_every: int = 1

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {name: getattr(self, name) for name in ("share", "num_prompt_tokens", "refresh_every")}

    def batches(
        self,
        source: Batches,
        student: Student,
        config: Mapping[str, Any],
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        seed: int,
    ) -> OnPolicyBatches:
        """The batches of a run."""
        return OnPolicyBatches(
            source,
            self.make_refresh(student, config, device=device, dtype=dtype),
            share=self.share,
            num_prompt_tokens=self.num_prompt_tokens,
            refresh_every=self.refresh_every,
            seed=seed,
        )


class OnPolicyBatches:
    """Another source's batches, of which a `share` of the steps keep only the beginnings: `sample` writes the rest.

    Only what was sampled counts. A step's draw depends on its number alone, so where the sampler answers the same for
    the same prompts, seed and student, a run that resumes at a multiple of `refresh_every` is the same too.
    """

    def __init__(
        self,
        source: Batches,
        refresh: Refresh,
        *,
        share: float,
        num_prompt_tokens: int,
        refresh_every: int = 1,
        seed: int = 0,
    ) -> None:
        """share: of steps, 0 to 1; num_prompt_tokens: of each window, at least 1."""
        if not 0 <= share <= 1 or num_prompt_tokens < 1:
            raise PowertrainError(f"on-policy: share must be 0 to 1 and prompts 1 token or more, got {share}")
        if refresh_every < 1:
            raise PowertrainError(f"on-policy: refresh_every must be 1 step or more, got {refresh_every}")
        self._source, self._refresh, self._refresh_every = source, refresh, refresh_every
        self._share, self._num_prompt_tokens, self._seed = share, num_prompt_tokens, seed
        self._sample: Sample | None = None
        self._sampled_in = -1
        self.sha256 = f"{source.sha256} on-policy {share} {num_prompt_tokens} {refresh_every} {seed}"

    def at(self, step: int) -> Batch:
        """The batch of a step. Raises `PowertrainError` where the answer of the sampler does not fit."""
        batch = self._source.at(step)
        draw = random.Random(self._seed * 1_000_003 + step)
        if draw.random() >= self._share:
            return batch
        begin, length = self._num_prompt_tokens, batch.token_ids.shape[1]
        if begin >= length:
            raise PowertrainError(f"on-policy: prompts of {begin} tokens leave nothing of windows of {length}")
        prompts = batch.token_ids[:, :begin].tolist()
        written = self._sampler(step)(prompts, length - begin, draw.randrange(2**31))
        if len(written) != len(prompts):
            raise PowertrainError(f"on-policy: sample gave {len(written)} continuations for {len(prompts)} prompts")
        token_ids = batch.token_ids.clone()
        is_counted = torch.zeros_like(token_ids, dtype=torch.bool)
        for row, ids in enumerate(written):
            ids = list(ids[: length - begin])
            token_ids[row, begin : begin + len(ids)] = torch.tensor(ids, dtype=token_ids.dtype)
            # the position before a token predicts it
            is_counted[row, begin - 1 : begin - 1 + len(ids)] = True
        if not bool(is_counted.any()):
            raise PowertrainError("on-policy: sample wrote no token")
        return Batch(token_ids, is_counted)

    def _sampler(self, step: int) -> Sample:
        """Of the student as it stood at the first call within the step's `refresh_every` steps."""
        if self._sample is None or step // self._refresh_every != self._sampled_in:
            self._sample, self._sampled_in = None, step // self._refresh_every  # the old one's memory goes first
            self._sample = self._refresh()
        return self._sample
