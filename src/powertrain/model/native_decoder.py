"""The decoder on the native CPU kernels: a whole step is one call, the head is another."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from powertrain.config import KVCacheDType
from powertrain.kernels.attention import AttentionStep
from powertrain.model.decoder import Decoder, KVCache
from powertrain.model.families import ModelConfig
from powertrain.model.layers import Block, Linear, RMSNorm, Rope
from powertrain.model.packed import PackedMatrix

MAX_HEAD_DIM = 256
MAX_GROUP = 64
BLOCK_SIZE_STEP = 16


class Backend(NamedTuple):
    """The native module and the thread team its work is spread over."""

    module: ModuleType
    team: Any


def why_not(config: ModelConfig) -> str | None:
    """Why the native kernels cannot run a model of this shape; None when they can."""
    if config.head_dim > MAX_HEAD_DIM:
        return f"heads of {config.head_dim} dimensions; the native kernels take at most {MAX_HEAD_DIM}"
    if config.num_heads // config.num_kv_heads > MAX_GROUP:
        return f"{config.num_heads // config.num_kv_heads} heads share a key head; the native kernels take {MAX_GROUP}"
    return None


class NativeKVCache(KVCache):
    """The paged cache as the native kernels lay it out: one array of bytes, keys of 16 positions side by side."""

    def __init__(self, native: Any, block_size: int) -> None:
        self.native, self.block_size = native, block_size
        self.layers = []


class NativeDecoder(Decoder):
    """A decoder whose matrices are `PackedMatrix`; activations are float32, caches float16 unless asked otherwise.

    A row's result depends neither on the other rows of its step nor on the number of threads.
    """

    kernels = "native"

    def __init__(
        self,
        config: ModelConfig,
        embedding: PackedMatrix,
        blocks: list[Block],
        norm: RMSNorm,
        head: Linear,
        rope: Rope,
        backend: Backend,
    ) -> None:
        """`embedding` [vocab, hidden] may be the head's own matrix."""
        table = torch.empty(0)  # rows are taken from the packed embedding
        super().__init__(config, table, blocks, norm, head, rope)
        self.packed_embedding = embedding
        self.kv_cache_dtype = "float16"
        packed = [fmt for linear in self.linears() for fmt in linear.formats if isinstance(fmt, PackedMatrix)]
        self.multiplies_integers = any(matrix.layout.quantizes_activations for matrix in packed)
        self._module, self._team = backend
        self._native = self._build()

    def _build(self) -> Any:
        config, (head,) = self.config, self.head.formats
        assert isinstance(head, PackedMatrix)
        cos, sin = self.rope.tables()
        decoder = self._module.Decoder(
            self._team,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            eps=config.rms_norm_eps,
            embedding=self.packed_embedding.matrix,
            head=head.matrix,
            norm=self.norm.weight,
            cos=cos,
            sin=sin,
        )
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            decoder.add_layer(
                attention_norm=block.attention_norm.weight,
                qkv=_matrices(attention.qkv),
                qkv_bias=attention.qkv.bias,
                query_norm=None if attention.query_norm is None else attention.query_norm.weight,
                key_norm=None if attention.key_norm is None else attention.key_norm.weight,
                output=_matrices(attention.output),
                output_bias=attention.output.bias,
                mlp_norm=block.mlp_norm.weight,
                gate_up=_matrices(mlp.gate_up),
                gate_up_bias=mlp.gate_up.bias,
                down=_matrices(mlp.down),
                down_bias=mlp.down.bias,
                window=attention.window or 0,
            )
        return decoder

    def forward(self, token_ids: torch.Tensor, step: AttentionStep, cache: KVCache) -> torch.Tensor:
        assert isinstance(cache, NativeKVCache)
        hidden = torch.empty(token_ids.shape[0], self.config.hidden_size)
        self._native.forward(
            token_ids,
            np.array(step.query_lens, dtype=np.int32),
            np.array(step.context_lens, dtype=np.int32),
            step.tables,
            cache.native,
            hidden,
        )
        return hidden

    def embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty(token_ids.shape[0], self.config.hidden_size)
        self._module.gather(self._team, self.packed_embedding.matrix, token_ids, out)
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out = torch.empty(hidden.shape[0], self.config.vocab_size)
        self._native.logits(hidden.contiguous(), out)
        return out

    def top_logits(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = hidden.shape[0]
        values, ids = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
        finite = torch.empty(rows, dtype=torch.bool)
        self._native.top(hidden.contiguous(), values, ids, finite)
        return values, ids, finite

    def with_kv_cache_dtype(self, dtype: KVCacheDType) -> Decoder:
        if dtype in ("auto", self.kv_cache_dtype):
            return self
        other = copy.copy(self)
        other.kv_cache_dtype = dtype
        return other

    def new_cache(self, num_blocks: int, block_size: int) -> NativeKVCache:
        config = self.config
        num_bytes = config.num_layers * num_blocks * self._bytes_per_block(block_size)
        native = self._module.Cache(
            np.zeros(num_bytes, dtype=np.uint8),  # zero pages, which take memory only once written
            self.kv_cache_dtype,
            config.num_layers,
            num_blocks,
            block_size,
            config.num_kv_heads,
            config.head_dim,
        )
        return NativeKVCache(native, block_size)

    def _bytes_per_block(self, block_size: int) -> int:
        config = self.config
        num_bytes: int = self._module.Cache.bytes_per_block(
            self.kv_cache_dtype, block_size, config.num_kv_heads, config.head_dim
        )
        return num_bytes

    def kv_bytes_per_token(self) -> int:
        return -(-self.config.num_layers * self._bytes_per_block(BLOCK_SIZE_STEP) // BLOCK_SIZE_STEP)

    def weight_bytes(self) -> int:
        (head,) = self.head.formats
        table = 0 if head is self.packed_embedding else self.packed_embedding.nbytes()
        return sum(linear.nbytes() for linear in self.linears()) + table


def _matrices(linear: Linear) -> list[Any]:
    return [fmt.matrix for fmt in linear.formats if isinstance(fmt, PackedMatrix)]
