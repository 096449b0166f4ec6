"""The one decoder: embedding, blocks, norm, head. It states its own bytes and operations."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from powertrain.config import KVCacheDType
from powertrain.kernels.attention import (
    AttentionStep,
    LayerCache,
    RoundedCache,
    ScaledCache,
    attention_backends,
    by_head,
)
from powertrain.kernels.fused import sum_pieces
from powertrain.kernels.op import Mode, choosing
from powertrain.model.families import ModelConfig
from powertrain.model.layers import Block, Linear, RMSNorm, Rope
from powertrain.model.weights import Dense


class KVCache:
    """Keys and values of every layer, in blocks: each a `LayerCache`, by head where a GPU reads it."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        is_rounded: bool = False,
    ) -> None:
        """Zeros, since a masked position still meets 0 * value. A type of 8 bits has scales beside it.

        `is_rounded`: floats that are rounded to what 4 bits hold.
        """
        shape = (num_blocks, block_size, 2 * config.num_kv_heads, config.head_dim)
        self.block_size = block_size
        self.layers: list[LayerCache] = []
        for _ in range(config.num_layers):
            values = _zeros(shape, device, dtype)
            if is_rounded:
                self.layers.append(RoundedCache(values))
            elif dtype.itemsize == 1:
                self.layers.append(ScaledCache(values, _zeros(shape[:3], device, torch.float32)))
            else:
                self.layers.append(values)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(by_head(shape), device=device, dtype=dtype).transpose(1, 2)
    # numpy asks the system for zero pages, which take memory only once written; torch would fill them now
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


class Decoder:
    """A pre-norm decoder with rotary grouped-query attention, as all supported families are.

    `embedding`: [vocab, hidden]; a head that is tied to it may share its memory. `kv_cache_dtype` names the type of
    the caches it makes: that of its activations unless `with_kv_cache_dtype` says otherwise.
    """

    kernels: Literal["native", "triton", "reference"] = "reference"
    is_deterministic = False
    """Whether a row's bits shall not depend on the rows beside it; the native kernels are so in any case."""

    multiplies_integers = False
    """Whether products run on activations rounded to 8 bits: faster than a peak in wider floats says."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        blocks: list[Block],
        norm: RMSNorm,
        head: Linear,
        rope: Rope,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.blocks = blocks
        self.norm = norm
        self.head = head
        self.rope = rope
        self.kv_cache_dtype = str(norm.weight.dtype).removeprefix("torch.")
        self.multiplies_integers = self.device.type == "cuda" and any(name.endswith(" a8") for name in self.formats())

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, step: AttentionStep, cache: KVCache) -> torch.Tensor:
        """token_ids: int64 [tokens] of this step. Writes their keys and values, returns hidden [tokens, hidden]."""
        x = self.embedded(token_ids)
        rope = self.rope.at(step.positions)
        delta: torch.Tensor | None = None
        with attention_backends(x.device), self._providers():
            for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
                delta = block(x, delta, rope, layer_cache, step)
        return x if delta is None else x.add_(sum_pieces(delta, x))

    def embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The stream [tokens, hidden] before the first block; token_ids: int64 [tokens]."""
        return self.embedding.index_select(0, token_ids)

    @torch.inference_mode()
    def after_block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The stream [tokens, hidden] of one whole sequence after a block, x before it: for judges, op by op.

        Keys and values stay as they are computed, whatever `kv_cache_dtype` says.
        """
        block_size = 16
        step = AttentionStep.of_one(0, len(x), block_size, x.device)
        cache = KVCache(replace(self.config, num_layers=1), -(-len(x) // block_size), block_size, x.device, x.dtype)
        x = x.clone()
        with attention_backends(x.device), self._providers():
            delta = self.blocks[index](x, None, self.rope.at(step.positions), cache.layers[0], step)
        return x.add_(sum_pieces(delta, x))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [rows, vocab] of hidden [rows, hidden]; callers pass only the rows they need."""
        return self.raw_logits(hidden).float()

    @torch.inference_mode()
    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits as the head's product leaves them, in the dtype of the activations."""
        with self._providers():
            return self.head(self.norm(hidden))

    @torch.inference_mode()
    def top_logits(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The k largest logits of hidden [rows, hidden], largest first and the lower id first among equal ones.

        Returns values float32 [rows, k], ids int64 [rows, k] and finite bool [rows]: False where any of the row's
        logits is a NaN or infinite, and then the rest of the row means nothing.
        """
        return top_of(self.logits(hidden), k)

    def _providers(self) -> AbstractContextManager[None]:
        """On a GPU, what `kernels` and `is_deterministic` say of the ops' providers."""
        if self.device.type != "cuda":
            return nullcontext()
        mode: Mode = "invariant" if self.is_deterministic else "fast"
        return choosing("reference" if self.kernels == "reference" else mode)

    def with_kv_cache_dtype(self, dtype: KVCacheDType) -> Decoder:
        """The same decoder with caches of another type; `auto` leaves it as it is. Raises `PowertrainError`."""
        if dtype in ("auto", self.kv_cache_dtype):
            return self
        other = copy.copy(self)
        other.kv_cache_dtype = dtype
        return other

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """An empty paged cache that `forward` takes."""
        is_rounded = self.kv_cache_dtype == "int4"
        return KVCache(self.config, num_blocks, block_size, self.device, self._cache_dtype(), is_rounded)

    def _cache_dtype(self) -> torch.dtype:
        if self.kv_cache_dtype == "fp8":
            return torch.float8_e4m3fn
        if self.kv_cache_dtype == "int4":
            return self.dtype
        dtype: torch.dtype = getattr(torch, self.kv_cache_dtype)
        return dtype

    @torch.inference_mode()
    def score(self, token_ids: torch.Tensor, chunk: int = 512) -> torch.Tensor:
        """Teacher-forced float32 logits [tokens, vocab] of one sequence, int64 [tokens].

        Runs the engine's own path in chunks of `chunk` tokens; a small chunk takes the products for few rows.
        """
        num_tokens = token_ids.shape[0]
        block_size = 32 if self.kv_cache_dtype == "int4" else 16  # 32 keys share a scale, as published
        cache = self.new_cache(-(-num_tokens // block_size), block_size)
        token_ids = token_ids.to(self.device)
        parts = []
        for start in range(0, num_tokens, chunk):
            stop = min(start + chunk, num_tokens)
            step = AttentionStep.of_one(start, stop, block_size, self.device)
            parts.append(self.logits(self.forward(token_ids[start:stop], step, cache)))
        return torch.cat(parts)

    def linears(self) -> list[Linear]:
        return [linear for block in self.blocks for linear in block.linears()] + [self.head]

    def step_bytes(self) -> int:
        """Bytes of weights one decode step reads: all products, not the embedding table's other rows."""
        return sum(linear.step_bytes() for linear in self.linears())

    def weight_bytes(self) -> int:
        """Bytes of weights in memory; a head that shares the embedding's memory counts once."""
        is_shared = any(isinstance(part, Dense) and part.is_held_by(self.embedding) for part in self.head.formats)
        table = 0 if is_shared else self.embedding.numel() * self.embedding.element_size()
        return sum(linear.nbytes() for linear in self.linears()) + table

    def kv_bytes_per_token(self) -> int:
        size = self._cache_dtype().itemsize
        scales = 4 * 2 * self.config.num_layers * self.config.num_kv_heads if size == 1 else 0
        return self.config.kv_bytes_per_token(size) + scales

    def flops_per_token(self, context: int) -> int:
        return self.config.flops_per_token(context)

    def formats(self) -> list[str]:
        """The distinct weight formats of the body and the head, for start lines and records."""
        names = {weight.name for linear in self.linears() for weight in linear.formats}
        return sorted(names)


def top_of(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest of logits [rows, vocab] as `Decoder.top_logits` gives them."""
    finite = torch.isfinite(logits).all(-1)
    if k == 1:
        values, ids = logits.max(-1, keepdim=True)
        return values, ids, finite
    values, ids = logits.topk(k, dim=-1)
    if bool(((logits >= values[:, -1:]).sum(-1) > k).any()):
        # several logits equal the k-th: only an order over the whole row says which of them belong
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values[:, :k], ids[:, :k], finite
    ids = ids.sort(-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order), finite
