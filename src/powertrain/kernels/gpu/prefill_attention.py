"""Paged attention of prompts in Triton: tiles of queries over all that is cached of their sequences.

The online softmax of Dao et al. 2022 (arXiv 2205.14135); the heads that share a key head are rows of one tile.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from powertrain.kernels.attention import AttentionStep, LayerCache, ScaledCache, entries
from powertrain.kernels.gpu.attention_tile import LOG2E, attend, dim_block_of, in_parts, joined
from powertrain.kernels.gpu.launch import launch, launch_options, wait_turn


@triton.jit(do_not_specialize=["table_width", "window"])
def _prefill_kernel(
    query,
    cache,
    scales,
    block_tables,
    tiles,
    out,
    table_width,
    query_stride,
    window,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BY_HEAD: tl.constexpr,
    KEYS: tl.constexpr,
    IS_SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    head, tile = tl.program_id(1), tiles + tl.program_id(0) * 4
    sequence = tl.load(tile)
    first_row = tl.load(tile + 1)
    first_position = tl.load(tile + 2).to(tl.int32)
    num_tokens = tl.load(tile + 3).to(tl.int32)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, DIM_BLOCK)
    token = rows // GROUP
    own = first_position + token
    valid = (token < num_tokens) & (rows < TOKENS * GROUP)
    mask = valid[:, None] & (columns < DIM)[None, :]
    heads = head * GROUP + rows % GROUP
    q = tl.load(
        query + (first_row + token)[:, None] * query_stride + heads[:, None] * DIM + columns[None, :], mask, other=0.0
    )
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    q = in_parts(q, IS_SCALED)
    acc = in_parts(tl.zeros((ROWS, DIM_BLOCK), tl.float32), IS_SCALED)
    end = first_position + num_tokens
    low = 0
    if window > 0:
        low = tl.maximum(first_position + 1 - window, 0)
    table = block_tables + sequence * table_width
    # what every row may see needs no mask
    masked_from = low // KEYS * KEYS
    if window == 0:
        masked_from = first_position // KEYS * KEYS
        for start in range(0, masked_from, KEYS):
            positions = start + tl.arange(0, KEYS)
            largest, total, acc = attend(
                q,
                cache,
                scales,
                table,
                positions,
                positions >= 0,
                None,
                head,
                scale,
                largest,
                total,
                acc,
                NUM_KV_HEADS,
                DIM,
                BLOCK_SIZE,
                BY_HEAD,
                DIM != DIM_BLOCK,
                IS_SCALED,
                PRECISION,
                IS_COMPILED,
            )
    for start in range(masked_from, end, KEYS):
        positions = start + tl.arange(0, KEYS)
        inside = positions[None, :] <= own[:, None]
        if window > 0:
            inside &= positions[None, :] > own[:, None] - window
        largest, total, acc = attend(
            q,
            cache,
            scales,
            table,
            positions,
            positions < end,
            inside,
            head,
            scale,
            largest,
            total,
            acc,
            NUM_KV_HEADS,
            DIM,
            BLOCK_SIZE,
            BY_HEAD,
            True,
            IS_SCALED,
            PRECISION,
            IS_COMPILED,
        )
    to = (first_row + token)[:, None] * (NUM_KV_HEADS * GROUP * DIM) + heads[:, None] * DIM + columns[None, :]
    tl.store(out + to, (joined(acc, IS_SCALED) / total[:, None]).to(out.dtype.element_ty), mask)


class PrefillConfig(NamedTuple):
    """Launch settings of prompts: rows (queries times heads) and positions of one turn, warps, stages."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


PREFILL = PrefillConfig(128, 64, 4, 3)


def tile_tokens(group: int) -> int:
    """How many query tokens one program of `prefill_attention` takes: those whose heads fill its rows."""
    return max(1, PREFILL.rows // group)


def prefill_attention(
    query: torch.Tensor,
    cache: LayerCache,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    window: int | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Chunks of prompts over all that is cached of them, causal; into the same rows of `out`, contiguous.

    tiles: int64 [tiles, 4]: sequence, first row of `query`, position of that row, number of rows (`tile_tokens` at
    most).
    """
    num_heads, dim = query.shape[1:]
    stored = entries(cache)
    block_size, num_kv_heads = stored.shape[1], stored.shape[2] // 2
    group = num_heads // num_kv_heads
    tokens = tile_tokens(group)
    launch(_prefill_kernel, (tiles.shape[0], num_kv_heads))(
        query,
        stored,
        cache.scales if isinstance(cache, ScaledCache) else stored,
        block_tables,
        tiles,
        out,
        block_tables.stride(0),
        query.stride(0),
        window or 0,
        dim**-0.5 * LOG2E.value,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        TOKENS=tokens,
        ROWS=triton.next_power_of_2(tokens * group),
        DIM=dim,
        DIM_BLOCK=dim_block_of(dim),
        BLOCK_SIZE=block_size,
        BY_HEAD=not stored.is_contiguous(),
        KEYS=PREFILL.keys,
        IS_SCALED=isinstance(cache, ScaledCache),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        IS_COMPILED=query.is_cuda,
        num_warps=PREFILL.num_warps,
        num_stages=PREFILL.num_stages,
        **launch_options(query),
    )
    return out


def make_tiles(step: AttentionStep, tokens: int, without: AbstractSet[int] = frozenset()) -> torch.Tensor:
    """The step's prompts in pieces of at most `tokens` rows, as `prefill_attention` wants them, long contexts first.

    `without`: numbers of sequences that are left out.
    """
    made, row = [], step.num_decodes
    for sequence in range(step.num_decodes, len(step.query_lens)):
        count, context = step.query_lens[sequence], step.context_lens[sequence]
        for first in range(0, 0 if sequence in without else count, tokens):
            made.append((sequence, row + first, context - count + first, min(tokens, count - first)))
        row += count
    made.sort(key=lambda tile: -tile[2])
    return torch.from_numpy(np.array(made, dtype=np.int64)).to(step.device, non_blocking=True)
