"""Paged attention (Kwon et al. 2023, arXiv 2309.06180): keys and values live in fixed-size blocks found by a table."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from powertrain.kernels.op import Op


@dataclass(frozen=True)
class AttentionStep:
    """Where the tokens of one step stand. Sequences come in plan order, those with a single token first.

    query_lens, context_lens: per sequence, tokens in this step and tokens known after it.
    tables: int64 [sequences, blocks], padded with any valid block; `block_tables` is the same on the device.
    The rest follows from them and is made by the first op that asks.
    """

    query_lens: list[int]
    context_lens: list[int]
    tables: npt.NDArray[np.int64]
    block_size: int
    device: torch.device

    @classmethod
    def of_one(cls, start: int, stop: int, block_size: int, device: torch.device) -> AttentionStep:
        """Positions `start` to `stop` of a single sequence that owns the cache's blocks in order, from the first."""
        table = np.arange(-(-stop // block_size)).reshape(1, -1)
        return cls([stop - start], [stop], table, block_size, device)

    @cached_property
    def block_tables(self) -> torch.Tensor:
        return self._tensor(self.tables)

    @cached_property
    def num_decodes(self) -> int:
        """How many leading sequences have one token."""
        return self.query_lens.count(1)

    @cached_property
    def context_lens_tensor(self) -> torch.Tensor:
        """int64 [num_decodes]."""
        return self._tensor(np.array(self.context_lens[: self.num_decodes], dtype=np.int64))

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [tokens], position of each token in its own sequence."""
        return self._tensor(self._positions)

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [tokens], where each token's key and value go: block * block_size + offset."""
        rows = np.repeat(np.arange(len(self.query_lens)), self.query_lens)
        blocks, offsets = np.divmod(self._positions, self.block_size)
        return self._tensor(self.tables[rows, blocks] * self.block_size + offsets)

    @cached_property
    def masks(self) -> dict[int | None, torch.Tensor]:
        """Additive masks of the decodes by window, made by the first layer that needs one."""
        return {}

    @cached_property
    def _positions(self) -> npt.NDArray[np.int64]:
        counts = np.array(self.query_lens)
        shifts: npt.NDArray[np.int64] = np.repeat(np.array(self.context_lens) - counts.cumsum(), counts)
        return shifts + np.arange(len(shifts))

    def _tensor(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


def _write_kv(key_value: torch.Tensor, cache: torch.Tensor, step: AttentionStep) -> None:
    """Store keys and values [tokens, 2 * kv_heads, d], keys first, at the step's slots of the layer's cache.

    cache: [blocks, block_size, 2 * kv_heads, d]: one copy in and one gather out serve both.
    """
    cache.view(-1, *key_value.shape[1:]).index_copy_(0, step.slots, key_value.to(cache.dtype))


def _paged_attention(query: torch.Tensor, cache: torch.Tensor, step: AttentionStep, window: int | None) -> torch.Tensor:
    """Causal grouped-query attention of this step's tokens over their whole contexts, which are already written.

    query: [tokens, heads, d]; cache: [blocks, block_size, 2 * kv_heads, d]; `window` limits each token to the last
    `window` positions including its own (Mistral). Returns [tokens, heads, d].
    """
    if len(step.query_lens) == step.num_decodes:
        return _decode_attention(query, cache, step, window)
    output = torch.empty_like(query)
    if step.num_decodes:
        output[: step.num_decodes] = _decode_attention(query[: step.num_decodes], cache, step, window)
    first = step.num_decodes
    for index in range(step.num_decodes, len(step.query_lens)):
        rows = slice(first, first + step.query_lens[index])
        context = step.context_lens[index]
        output[rows] = _prefill_attention(query[rows], cache, step.block_tables[index], context, window)
        first = rows.stop
    return output


def _decode_attention(
    query: torch.Tensor, cache: torch.Tensor, step: AttentionStep, window: int | None
) -> torch.Tensor:
    """One query token per sequence, all sequences at once over contexts padded to the longest.

    The heads that share a key head become the rows of one small product, so that no key is repeated in memory.
    """
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = cache.shape[1], cache.shape[2] // 2
    longest = max(step.context_lens[:num_seqs])
    tables = step.block_tables[:num_seqs, : -(-longest // block_size)]
    width = tables.shape[1] * block_size
    # index_select copies whole blocks; indexing with the table itself is several times slower on a CPU
    gathered = cache.index_select(0, tables.flatten()).view(num_seqs, width, 2 * num_kv_heads, head_dim)
    keys, values = gathered.transpose(1, 2).to(query.dtype).chunk(2, dim=1)
    grouped = query.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = None
    if num_seqs == 1 and window is None:
        keys, values = keys[:, :, :longest], values[:, :, :longest]
    else:
        mask = _decode_mask(step, num_seqs, width, window, query)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.reshape(num_seqs, num_heads, head_dim)


def _decode_mask(
    step: AttentionStep, num_seqs: int, width: int, window: int | None, query: torch.Tensor
) -> torch.Tensor:
    """0 where a decode may look and -inf elsewhere: [sequences, 1, 1, width] in the query's dtype."""
    mask = step.masks.get(window)
    if mask is None:
        at = torch.arange(width, device=query.device)
        lens = step.context_lens_tensor[:num_seqs].unsqueeze(1)
        hidden = at >= lens
        if window is not None:
            hidden |= at < lens - window
        mask = query.new_zeros(num_seqs, width).masked_fill_(hidden, -torch.inf).view(num_seqs, 1, 1, width)
        step.masks[window] = mask
    return mask


def _prefill_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    context: int,
    window: int | None,
) -> torch.Tensor:
    """A chunk of one sequence: query [tokens, heads, d] are the last `tokens` of `context` positions."""
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = cache.shape[1], cache.shape[2] // 2
    blocks = block_table[: -(-context // block_size)]
    groups = num_heads // num_kv_heads
    gathered = cache.index_select(0, blocks).view(-1, 2 * num_kv_heads, head_dim)[:context]
    keys, values = gathered.transpose(0, 1).to(query.dtype).chunk(2)
    if groups > 1:
        keys = keys.repeat_interleave(groups, dim=0)
        values = values.repeat_interleave(groups, dim=0)
    is_whole = num_tokens == context and (window is None or window >= context)
    mask = None
    if not is_whole:
        own = torch.arange(context - num_tokens, context, device=query.device).unsqueeze(1)
        at = torch.arange(context, device=query.device).unsqueeze(0)
        mask = at <= own
        if window is not None:
            mask &= at > own - window
    out = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.unsqueeze(0),
        values.unsqueeze(0),
        attn_mask=mask,
        is_causal=is_whole,
    )
    return out[0].transpose(0, 1)


def attention_backends(device: torch.device) -> AbstractContextManager[None]:
    """Torch's attention kernels for one step. On CUDA without cuDNN's, which plans anew for every context length."""
    if device.type != "cuda":
        return nullcontext()
    context: AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return context


write_kv = Op("write_kv", _write_kv)
paged_attention = Op("paged_attention", _paged_attention)
