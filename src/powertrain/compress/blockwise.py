"""Block by block through a model: each sees what the compressed blocks before it give, and so do its own later layers.

In memory: one block's weights and the stream between blocks for all calibration tokens. Where a method wants the inputs
before compression too, a second stream runs through the original blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from powertrain.compress.gptq import Moments
from powertrain.compress.plain_decoder import (
    ATTENTION_INPUT,
    DOWN_INPUT,
    LINEARS_OF_STEP,
    MLP_INPUT,
    OUTPUT_INPUT,
    PlainBlock,
    Weights,
)
from powertrain.model.families import ModelConfig

TOKENS_AT_ONCE = 4096

Compress = Callable[[str, torch.Tensor, Moments], torch.Tensor]
"""(name within the block, weight, moments of its inputs) -> what the weight becomes, as floats."""

Streams = Sequence[tuple[torch.Tensor, torch.Tensor | None]]
"""Batches of activations [sequences, tokens, width], and of the same before compression."""


class CalibratedWalk:
    """The streams of all calibration tokens between two blocks, and the way through one."""

    def __init__(
        self, config: ModelConfig, embedding: torch.Tensor, token_ids: torch.Tensor, *, keeps_original: bool
    ) -> None:
        """embedding: [vocab, hidden]; token_ids: int64 [samples, tokens]. `keeps_original`: for asymmetric moments."""
        self._config = config
        self._keeps_original = keeps_original
        at_once = max(1, TOKENS_AT_ONCE // token_ids.shape[1])
        batches = [embedding[ids].float() for ids in torch.split(token_ids, at_once)]
        # a block makes new streams and changes none: both may begin as the same tensor
        self._streams: list[tuple[torch.Tensor, torch.Tensor | None]] = [
            (batch, batch if keeps_original else None) for batch in batches
        ]

    @torch.inference_mode()
    def through(self, index: int, weights: Weights, wanted: set[str], compress: Compress) -> None:
        """Take the streams through block `index`; `compress` is asked for each of the `wanted` matrices in turn.

        weights: the block's tensors as float32.
        """
        current = dict(weights)
        block = PlainBlock(self._config, index, current)
        original = PlainBlock(self._config, index, weights) if self._keeps_original else None

        def compress_step(step: int, inputs: Callable[[PlainBlock, torch.Tensor], torch.Tensor]) -> None:
            names = [name for name in LINEARS_OF_STEP[step] if name in wanted]
            if not names:
                return
            moments = self._moments(block, original, inputs)
            for name in names:
                current[f"{name}.weight"] = compress(name, current[f"{name}.weight"], moments)

        compress_step(ATTENTION_INPUT, lambda of, x: of.normed(x, "input_layernorm"))
        compress_step(OUTPUT_INPUT, lambda of, x: of.attended(of.normed(x, "input_layernorm")))
        self._advance(block, original, PlainBlock.with_attention)
        compress_step(MLP_INPUT, lambda of, x: of.normed(x, "post_attention_layernorm"))
        compress_step(DOWN_INPUT, lambda of, x: of.gated(of.normed(x, "post_attention_layernorm")))
        self._advance(block, original, PlainBlock.with_mlp)

    @torch.inference_mode()
    def head_moments(self, norm: torch.Tensor) -> Moments:
        """Of the head's inputs, after the last block; norm: the final norm's weight."""
        block = PlainBlock(self._config, 0, {"norm.weight": norm})
        return self._moments(block, block if self._keeps_original else None, lambda of, x: of.normed(x, "norm"))

    def _moments(
        self,
        block: PlainBlock,
        original: PlainBlock | None,
        inputs: Callable[[PlainBlock, torch.Tensor], torch.Tensor],
    ) -> Moments:
        moments: Moments | None = None
        for x, before in self._streams:
            found = inputs(block, x)
            wanted = inputs(original, before) if original is not None and before is not None else None
            if moments is None:
                moments = Moments.zeros(found.shape[-1], found.device, has_shift=wanted is not None)
            moments.add(found, wanted)
        assert moments is not None
        return moments

    def _advance(
        self,
        block: PlainBlock,
        original: PlainBlock | None,
        half: Callable[[PlainBlock, torch.Tensor], torch.Tensor],
    ) -> None:
        for at, (x, before) in enumerate(self._streams):
            wanted = half(original, before) if original is not None and before is not None else None
            self._streams[at] = (half(block, x), wanted)


def names_by_block(names: Sequence[str]) -> tuple[list[str], list[list[str]], list[str]]:
    """A model's tensor names: the embedding's, each block's, and the rest."""
    num_blocks = max((block_of(name) or 0 for name in names), default=0) + 1
    blocks: list[list[str]] = [[] for _ in range(num_blocks)]
    first: list[str] = []
    rest: list[str] = []
    for name in names:
        index = block_of(name)
        if index is not None:
            blocks[index].append(name)
        else:
            (first if name.startswith("model.embed_tokens.") else rest).append(name)
    return first, blocks, rest


def block_of(name: str) -> int | None:
    """The block that a tensor or layer is of: 3 for `model.layers.3.mlp.up_proj.weight`."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdigit() else None
