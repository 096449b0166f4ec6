"""Paged attention (Kwon et al. 2023, arXiv 2309.06180): keys and values live in fixed-size blocks found by a table."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from powertrain.kernels.fused import apply_rope, rms_norm
from powertrain.kernels.gpu_provider import BY_ROW, invariant_provider, triton_provider
from powertrain.kernels.op import Op


@dataclass(frozen=True)
class AttentionStep:
    """Where the tokens of one step stand. Sequences come in plan order, those with a single token first.

    query_lens, context_lens: per sequence, tokens in this step and tokens known after it; `is_bound` where the latter
    are the most there may be, and only `context_lens_tensor` knows.
    tables: int64 [sequences, blocks], padded with any valid block; `block_tables` is the same on the device.
    The rest follows from them and is made by the first op that asks.
    """

    query_lens: list[int]
    context_lens: list[int]
    tables: npt.NDArray[np.int64]
    block_size: int
    device: torch.device
    is_bound: bool = False

    @classmethod
    def of_one(cls, start: int, stop: int, block_size: int, device: torch.device) -> AttentionStep:
        """Positions `start` to `stop` of a single sequence that owns the cache's blocks in order, from the first."""
        table = np.arange(-(-stop // block_size)).reshape(1, -1)
        return cls([stop - start], [stop], table, block_size, device)

    @cached_property
    def block_tables(self) -> torch.Tensor:
        return self._tensor(self.tables)

    @classmethod
    def of_decodes(
        cls,
        positions: torch.Tensor,
        context_lens: torch.Tensor,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        block_size: int,
    ) -> AttentionStep:
        """Decodes alone whose places are known to the device only, as a captured graph has them.

        All int64, [sequences] and [sequences, blocks]. A row with context 0 is padding: its slot is negative.
        """
        num_seqs, num_blocks = block_tables.shape
        longest = num_blocks * block_size
        tables = np.empty((num_seqs, 0), dtype=np.int64)
        step = cls([1] * num_seqs, [longest] * num_seqs, tables, block_size, positions.device, is_bound=True)
        # given here, what the properties would make from the lists above
        vars(step).update(positions=positions, context_lens_tensor=context_lens, slots=slots, block_tables=block_tables)
        return step

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
    def shared(self) -> dict[Any, Any]:
        """What the first layer makes for all: the decodes' masks, their split, the prompts' tiles."""
        return {}

    @cached_property
    def _positions(self) -> npt.NDArray[np.int64]:
        counts = np.array(self.query_lens)
        shifts: npt.NDArray[np.int64] = np.repeat(np.array(self.context_lens) - counts.cumsum(), counts)
        return shifts + np.arange(len(shifts))

    def _tensor(self, values: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)


class ScaledCache(NamedTuple):
    """A layer's cache in 8 bits, each key and value of a head with its own scale: nothing to calibrate.

    values: int8 or float8_e4m3fn [blocks, block_size, 2 * kv_heads, d]; scales: float32 [blocks, block_size,
    2 * kv_heads], absmax / 127 or absmax / 448. In memory as `LayerCache` says, both alike.
    """

    values: torch.Tensor
    scales: torch.Tensor


class RoundedCache(NamedTuple):
    """A layer's cache whose full blocks hold only what 4 bits can: a study of accuracy, which saves no memory.

    values: float [blocks, block_size, 2 * kv_heads, d]. Once the last slot of a block is written, its keys are rounded
    per channel over the block's tokens and its values per token over groups of `VALUE_GROUP` channels, as KIVI does
    (Liu et al. 2024, arXiv 2402.02750); the newest tokens, in a block that is not full, stay as they are. Stored for
    good it would take 4 bits and, of two float16 for each group, 32 / block_size more for keys and 1 for values.
    """

    values: torch.Tensor


VALUE_GROUP = 32

LayerCache: TypeAlias = torch.Tensor | ScaledCache | RoundedCache
"""A layer's keys and values [blocks, block_size, 2 * kv_heads, d], keys first: one copy in and one gather out.

In memory either so, or with the positions of a block next to each other for each head (`by_head`): who reads one head
then reads long runs.
"""


def by_head(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A cache's shape with heads before positions; a tensor of it, these two axes transposed, is a `LayerCache`."""
    return (shape[0], shape[2], shape[1], *shape[3:])


def entries(cache: LayerCache) -> torch.Tensor:
    """What the cache stores, without scales."""
    return cache if isinstance(cache, torch.Tensor) else cache.values


def largest_entry(dtype: torch.dtype) -> float:
    """The largest number that a cache of 8 bits stores."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def _write_kv(key_value: torch.Tensor, cache: LayerCache, step: AttentionStep) -> None:
    """Store keys and values [tokens, 2 * kv_heads, d], keys first, at the step's slots of the layer's cache."""
    if not isinstance(cache, ScaledCache):
        stored = entries(cache)
        _store(stored, step.slots, key_value.to(stored.dtype))
        if isinstance(cache, RoundedCache):
            _round_full_blocks(stored, step.slots)
        return
    limit = largest_entry(cache.values.dtype)
    scales = key_value.float().abs().amax(-1) / limit
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    scaled = (key_value.float() / scales.unsqueeze(-1)).clamp_(-limit, limit)
    rounded = scaled.round_() if cache.values.dtype == torch.int8 else scaled
    codes = rounded.to(cache.values.dtype).view(torch.uint8)  # what copies by index does not know 8-bit floats
    _store(cache.values.view(torch.uint8), step.slots, codes)
    _store(cache.scales, step.slots, scales)


def _store(cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    if cache.is_contiguous():
        cache.view(-1, *rows.shape[1:]).index_copy_(0, slots, rows)
    else:
        cache[slots // cache.shape[1], slots % cache.shape[1]] = rows


def _round_full_blocks(stored: torch.Tensor, slots: torch.Tensor) -> None:
    """Round the blocks [block_size, 2 * kv_heads, d] whose last slot is among those just written."""
    block_size, head_dim = stored.shape[1], stored.shape[3]
    full = slots[slots % block_size == block_size - 1] // block_size
    if not len(full):
        return
    keys, values = stored.index_select(0, full).chunk(2, dim=2)
    size = VALUE_GROUP if head_dim % VALUE_GROUP == 0 else head_dim
    rounded_keys = round_to_4_bits(keys, dim=1)
    rounded_values = round_to_4_bits(values.reshape(*values.shape[:3], -1, size), dim=-1).flatten(-2)
    stored.index_copy_(0, full, torch.cat((rounded_keys, rounded_values), dim=2))


def round_to_4_bits(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x with each run along `dim` on a grid of 16 steps over its range, whose scale and minimum are float16."""
    wide = x.float()
    low = wide.amin(dim, keepdim=True).half().float()
    scale = ((wide.amax(dim, keepdim=True) - low) / 15).half().float()
    codes = torch.where(scale == 0, 0, (wide - low) / scale).round_().clamp_(0, 15)
    return (codes * scale + low).to(x.dtype)


def gather(cache: LayerCache, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys and values of whole blocks, [blocks * block_size, 2 * kv_heads, d] in `dtype`.

    index_select copies whole blocks; indexing with the table itself is several times slower on a CPU.
    """
    if not isinstance(cache, ScaledCache):
        return entries(cache).index_select(0, blocks).flatten(0, 1).to(dtype)
    values = cache.values.view(torch.uint8).index_select(0, blocks).view(cache.values.dtype)
    scaled = values.float() * cache.scales.index_select(0, blocks).unsqueeze(-1)
    return scaled.flatten(0, 1).to(dtype)


def _rotate_and_write(
    qkv: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    cache: LayerCache,
    step: AttentionStep,
) -> torch.Tensor:
    """Norm and rotate queries and keys, maybe in place, store keys and values, return the queries [tokens, heads, d].

    qkv: [tokens, heads + 2 * kv_heads, d]: queries, keys, values; or float32 [pieces, tokens, ...], a product left in
    pieces: then their sum, rounded to the tables' dtype. `rope` as `apply_rope` takes it; `norms`: weights [d]
    of the queries' and the keys' RMSNorm (Qwen3), or None; cache and step as in `write_kv`.
    """
    if qkv.ndim == 4:
        qkv = qkv.sum(0).to(rope[0].dtype)
    num_kv_heads = entries(cache).shape[2] // 2
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    query_key = qkv[:, : num_heads + num_kv_heads]
    if norms is not None:
        query_key[:, :num_heads] = rms_norm(query_key[:, :num_heads], norms[0], eps)
        query_key[:, num_heads:] = rms_norm(query_key[:, num_heads:], norms[1], eps)
    apply_rope(query_key, *rope)
    write_kv(qkv[:, num_heads:], cache, step)
    return qkv[:, :num_heads]


def _paged_attention(query: torch.Tensor, cache: LayerCache, step: AttentionStep, window: int | None) -> torch.Tensor:
    """Causal grouped-query attention of this step's tokens over their whole contexts, which are already written.

    query: [tokens, heads, d]; `window` limits each token to the last
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


def _decode_attention(query: torch.Tensor, cache: LayerCache, step: AttentionStep, window: int | None) -> torch.Tensor:
    """One query token per sequence, all sequences at once over contexts padded to the longest.

    The heads that share a key head become the rows of one small product, so that no key is repeated in memory.
    """
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = entries(cache).shape[1], entries(cache).shape[2] // 2
    longest = max(step.context_lens[:num_seqs])
    tables = step.block_tables[:num_seqs, : -(-longest // block_size)]
    width = tables.shape[1] * block_size
    gathered = gather(cache, tables.flatten(), query.dtype).view(num_seqs, width, 2 * num_kv_heads, head_dim)
    keys, values = gathered.transpose(1, 2).chunk(2, dim=1)
    grouped = query.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    mask = None
    if num_seqs == 1 and window is None and not step.is_bound:
        keys, values = keys[:, :, :longest], values[:, :, :longest]
    else:
        mask = _decode_mask(step, num_seqs, width, window, query)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return out.reshape(num_seqs, num_heads, head_dim)


def _decode_mask(
    step: AttentionStep, num_seqs: int, width: int, window: int | None, query: torch.Tensor
) -> torch.Tensor:
    """0 where a decode may look and -inf elsewhere: [sequences, 1, 1, width] in the query's dtype."""
    mask: torch.Tensor | None = step.shared.get(("mask", window))
    if mask is None:
        at = torch.arange(width, device=query.device)
        lens = step.context_lens_tensor[:num_seqs].unsqueeze(1)
        hidden = at >= lens
        if window is not None:
            hidden |= at < lens - window
        mask = query.new_zeros(num_seqs, width).masked_fill_(hidden, -torch.inf).view(num_seqs, 1, 1, width)
        step.shared["mask", window] = mask
    return mask


def _prefill_attention(
    query: torch.Tensor,
    cache: LayerCache,
    block_table: torch.Tensor,
    context: int,
    window: int | None,
) -> torch.Tensor:
    """A chunk of one sequence: query [tokens, heads, d] are the last `tokens` of `context` positions."""
    num_tokens, num_heads, _ = query.shape
    block_size, num_kv_heads = entries(cache).shape[1], entries(cache).shape[2] // 2
    blocks = block_table[: -(-context // block_size)]
    groups = num_heads // num_kv_heads
    gathered = gather(cache, blocks, query.dtype)[:context]
    keys, values = gathered.transpose(0, 1).chunk(2)
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
rotate_and_write = Op(
    "rotate_and_write", _rotate_and_write, (triton_provider("fused", "rotate_and_write", None, BY_ROW),)
)
paged_attention = Op(
    "paged_attention",
    _paged_attention,
    (triton_provider("attention", "paged_attention"), invariant_provider("paged_attention")),
)
