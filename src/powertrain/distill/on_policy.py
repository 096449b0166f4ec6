"""Batches that a model wrote: the student corrected where it would go itself.

GKD (Agarwal et al. 2023, arXiv 2306.13649): a share of the steps trains on continuations that the student has just
sampled, with the teacher's distributions at each of their positions; no gradient passes through the sampling.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from powertrain.distill.batches import Batch, Batches
from powertrain.types import PowertrainError

Sample = Callable[[list[list[int]], int, int], Sequence[Sequence[int]]]
"""(prompts, tokens to add, seed) -> the continuation of each prompt, which may end early. An engine, say."""


class OnPolicyBatches:
    """Another source's batches, of which a `share` of the steps keep only the beginnings: `sample` writes the rest.

    Only what was sampled counts. A step's draw depends on its number alone, so where `sample` answers the same for the
    same prompts, seed and student, a resumed run is the same too.
    """

    def __init__(self, source: Batches, sample: Sample, *, share: float, num_prompt_tokens: int, seed: int = 0) -> None:
        """share: of steps, 0 to 1; num_prompt_tokens: of each window, at least 1."""
        if not 0 <= share <= 1 or num_prompt_tokens < 1:
            raise PowertrainError(f"on-policy: share must be 0 to 1 and prompts 1 token or more, got {share}")
        self._source, self._sample = source, sample
        self._share, self._num_prompt_tokens, self._seed = share, num_prompt_tokens, seed
        self.sha256 = f"{source.sha256} on-policy {share} {num_prompt_tokens} {seed}"

    def at(self, step: int) -> Batch:
        """The batch of a step. Raises `PowertrainError` where the answer of `sample` does not fit."""
        batch = self._source.at(step)
        draw = random.Random(self._seed * 1_000_003 + step)
        if draw.random() >= self._share:
            return batch
        begin, length = self._num_prompt_tokens, batch.token_ids.shape[1]
        if begin >= length:
            raise PowertrainError(f"on-policy: prompts of {begin} tokens leave nothing of windows of {length}")
        prompts = batch.token_ids[:, :begin].tolist()
        written = self._sample(prompts, length - begin, draw.randrange(2**31))
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
