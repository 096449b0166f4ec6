"""Block by block through a model: each sees what the compressed blocks before it give, and so do its own later layers.

In memory: one block's weights, and for all calibration tokens the stream between blocks and what the attention or the
MLP inside it made of that. Where a method wants the inputs
before compression too, a second stream runs through the original blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

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

LookAtCache = Callable[[torch.Tensor, torch.Tensor], None]
"""Rotated keys and values of some tokens, [sequences, kv_heads, tokens, d] -> None."""

Pair = tuple[torch.Tensor, torch.Tensor | None]
"""A batch of activations [sequences, tokens, width], and the same before compression where that is kept."""

HALVES = (
    ("input_layernorm", ATTENTION_INPUT, PlainBlock.attended, OUTPUT_INPUT),
    ("post_attention_layernorm", MLP_INPUT, PlainBlock.gated, DOWN_INPUT),
)
"""The halves of a block: the norm, what reads its output, what is made of that, and the matrix that reads this."""


class CalibratedWalk:
    """The streams of all calibration tokens between two blocks, and the way through one."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        token_ids: torch.Tensor,
        *,
        keeps_original: bool,
        wants_hessians: bool = True,
    ) -> None:
        """embedding: [vocab, hidden]; token_ids: int64 [samples, tokens]. `keeps_original`: for asymmetric moments.

        `wants_hessians` False leaves the moments' Hessians empty, for methods that only ask how large inputs are.
        """
        self._config = config
        self._keeps_original = keeps_original
        self._wants_hessians = wants_hessians
        at_once = max(1, TOKENS_AT_ONCE // token_ids.shape[1])
        batches = [embedding[ids].float() for ids in torch.split(token_ids.to(embedding.device), at_once)]
        # a block makes new streams and changes none: both may begin as the same tensor
        self._streams: list[Pair] = [(batch, batch if keeps_original else None) for batch in batches]

    @torch.inference_mode()
    def examples(self, index: int, weights: Weights, *, is_original: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """What block `index` gets now and what it should give, float32 [sequences, tokens, hidden], for all tokens.

        For methods that change all matrices of a block together. weights: the original block's. `is_original`: the
        targets are its outputs in the original model, which must be kept; else those for what it gets now.
        """
        block = PlainBlock(self._config, index, weights)
        targets = []
        for x, before in self._streams:
            assert before is not None or not is_original
            targets.append(block(before if is_original and before is not None else x))
        return torch.cat([x for x, _ in self._streams]), torch.cat(targets)

    @torch.inference_mode()
    def through(
        self,
        index: int,
        weights: Weights,
        wanted: set[str],
        compress: Compress,
        changed: Weights | None = None,
        look: LookAtCache | None = None,
    ) -> None:
        """Take the streams through block `index`; `compress` is asked for each of the `wanted` matrices in turn.

        weights: the block's tensors as float32. changed: what others of them have become already. `look` is shown the
        keys and values that the compressed matrices give.
        """
        current = {**weights, **(changed or {})}
        block = PlainBlock(self._config, index, current)
        original = PlainBlock(self._config, index, weights) if self._keeps_original else None

        def compress_all(step: int, inputs: Iterable[Pair]) -> None:
            names = [name for name in LINEARS_OF_STEP[step] if name in wanted]
            if names:
                moments = self._moments(inputs)
                for name in names:
                    current[f"{name}.weight"] = compress(name, current[f"{name}.weight"], moments)

        def each(pairs: Iterable[Pair], compute: Callable[[PlainBlock, torch.Tensor], torch.Tensor]) -> Iterator[Pair]:
            for x, before in pairs:
                wanted = compute(original, before) if original is not None and before is not None else None
                yield compute(block, x), wanted

        for norm, first, inside, last in HALVES:
            normed = partial(PlainBlock.normed, name=norm)
            compress_all(first, each(self._streams, normed))
            if look is not None and first == ATTENTION_INPUT:
                for x, _ in self._streams:
                    look(*block.keys_and_values(normed(block, x)))
            # kept for all tokens: they give the last matrix's moments, and then what it adds to the stream
            inner = list(each(each(self._streams, normed), inside))
            compress_all(last, inner)
            (name,) = LINEARS_OF_STEP[last]
            added = each(inner, partial(_product, name))
            self._streams = [_plus(stream, more) for stream, more in zip(self._streams, added, strict=True)]

    @torch.inference_mode()
    def head_moments(self, norm: torch.Tensor) -> Moments:
        """Of the head's inputs, after the last block; norm: the final norm's weight."""
        block = PlainBlock(self._config, 0, {"norm.weight": norm})
        return self._moments(
            (block.normed(x, "norm"), None if before is None else block.normed(before, "norm"))
            for x, before in self._streams
        )

    def _moments(self, pairs: Iterable[Pair]) -> Moments:
        moments: Moments | None = None
        for found, wanted in pairs:
            if moments is None:
                moments = Moments.zeros(
                    found.shape[-1],
                    found.device,
                    has_shift=wanted is not None,
                    has_hessian=self._wants_hessians,
                )
            moments.add(found, wanted)
        assert moments is not None
        return moments


def _product(name: str, block: PlainBlock, x: torch.Tensor) -> torch.Tensor:
    return block.linear(name, x)


def _plus(stream: Pair, more: Pair) -> Pair:
    (x, before), (y, wanted) = stream, more
    return x + y, None if before is None or wanted is None else before + wanted


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
