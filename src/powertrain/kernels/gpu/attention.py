"""Triton kernels for paged attention: decodes split along their contexts, prompts in tiles over the same cache.

Decode follows flash decoding (Dao et al. 2023): every context is cut into pieces of one length, a fixed number of
programs works off the list of all pieces, and a second kernel merges each row's pieces in order. The list is made on
the device, so that a captured graph serves any lengths; the pieces grow with the sum of the contexts, so that ragged
batches are shared out evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from powertrain.kernels.attention import AttentionStep
from powertrain.kernels.gpu.launch import launch_options, wait_turn


class DecodeConfig(NamedTuple):
    """Launch settings of decodes: positions of one turn, pieces to aim at for each processor, warps, stages."""

    keys: int
    pieces: int
    num_warps: int
    num_stages: int


LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class DecodeSplit:
    """How the contexts of one step are cut: made once, used by every layer.

    piece_lens: int32 [1], positions of a piece, a multiple of 64; starts: int32 [sequences + 1], the number of each
    sequence's first piece; sequence_of, piece_of: int32 [pieces], by piece number.
    """

    piece_len: torch.Tensor
    starts: torch.Tensor
    sequence_of: torch.Tensor
    piece_of: torch.Tensor
    num_programs: int
    config: DecodeConfig


def paged_attention(query: torch.Tensor, cache: torch.Tensor, step: AttentionStep, window: int | None) -> torch.Tensor:
    """`kernels.attention.paged_attention`: the leading decodes, then the chunks of prompts."""
    num_decodes, num_kv_heads = step.num_decodes, cache.shape[2] // 2
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_decodes:
        split = step.shared.get("split")
        if split is None:
            longest = max(step.context_lens[:num_decodes])
            processors = _num_processors(query.device)
            split = split_decodes(step.context_lens_tensor, longest, num_kv_heads, processors)
            step.shared["split"] = split
        decode_attention(
            query[:num_decodes], cache, step.block_tables, step.context_lens_tensor, split, window, out[:num_decodes]
        )
    if num_decodes < len(step.query_lens):
        tiles = step.shared.get("tiles")
        if tiles is None:
            tiles = step.shared["tiles"] = _tiles(step, tile_tokens(query.shape[1] // num_kv_heads))
        prefill_attention(query, cache, step.block_tables, tiles, window, out)
    return out


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _tiles(step: AttentionStep, tokens: int) -> torch.Tensor:
    """The step's prompts in pieces of at most `tokens` rows, as `prefill_attention` wants them, long contexts first."""
    made, row = [], step.num_decodes
    for sequence in range(step.num_decodes, len(step.query_lens)):
        count, context = step.query_lens[sequence], step.context_lens[sequence]
        for first in range(0, count, tokens):
            made.append((sequence, row + first, context - count + first, min(tokens, count - first)))
        row += count
    made.sort(key=lambda tile: -tile[2])
    return torch.from_numpy(np.array(made, dtype=np.int64)).to(step.device, non_blocking=True)


@triton.jit
def _split_kernel(
    context_lens,
    piece_len,
    starts,
    sequence_of,
    piece_of,
    num_seqs,
    target,
    FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    own = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    lens = tl.load(context_lens + at, at < num_seqs, other=0).to(tl.int32)
    length = FIXED
    if FIXED == 0:
        length = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(lens), target), 64), 1) * 64
    counts = (lens + length - 1) // length
    first = tl.sum(tl.where(at < own, counts, 0))
    count = tl.sum(tl.where(at == own, counts, 0))
    tl.store(starts + own, first)
    if own == num_seqs - 1:
        tl.store(starts + num_seqs, first + count)
        tl.store(piece_len, length)
    for piece in range(0, count):
        tl.store(sequence_of + first + piece, own)
        tl.store(piece_of + first + piece, piece)


def split_decodes(
    context_lens: torch.Tensor,
    max_context: int,
    num_kv_heads: int,
    num_processors: int,
    fixed: int = 0,
    config: DecodeConfig | None = None,
) -> DecodeSplit:
    """Cut contexts, int64 [sequences] on the device and at most `max_context` each.

    `fixed` is a piece's length that depends on nothing else, so that neither do a row's bits; 0 cuts for speed.
    """
    num_seqs = context_lens.shape[0]
    config = config or config_for(num_seqs)
    target = max(1, config.pieces * num_processors // num_kv_heads)
    most = num_seqs * triton.cdiv(max_context, fixed) if fixed else target + num_seqs
    device = context_lens.device
    empty = torch.empty(1 + num_seqs + 1 + 2 * most, dtype=torch.int32, device=device)
    piece_len, starts, sequence_of, piece_of = empty.split((1, num_seqs + 1, most, most))
    _split_kernel[(num_seqs,)](
        context_lens,
        piece_len,
        starts,
        sequence_of,
        piece_of,
        num_seqs,
        target,
        FIXED=fixed,
        BLOCK=triton.next_power_of_2(num_seqs),
        num_warps=1,
        **launch_options(context_lens),
    )
    return DecodeSplit(piece_len, starts, sequence_of, piece_of, min(most, 2 * target), config)


def config_for(num_seqs: int) -> DecodeConfig:
    """As measured on an H100 at contexts of 1k: one wave of programs for few sequences, small programs for many."""
    if num_seqs <= 4:
        return DecodeConfig(64, 4, 2, 2)
    if num_seqs <= 16:
        return DecodeConfig(64, 2, 4, 3)
    if num_seqs <= 48:
        return DecodeConfig(64, 1, 4, 3)
    return DecodeConfig(64, 2, 2, 3) if num_seqs <= 96 else DecodeConfig(64, 8, 2, 2)


@triton.jit
def _turn(query, keys, values, inside, scale, largest, total, acc, PRECISION: tl.constexpr):
    """Fold the scores of one block of keys into the running maximum, sum and weighted values."""
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    if inside is not None:
        scores = tl.where(inside, scores, float("-inf"))
    top = tl.maximum(largest, tl.max(scores, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores - safe[:, None])
    keep = tl.exp2(largest - safe)
    total = total * keep + tl.sum(weights, 1)
    acc = acc * keep[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return top, total, acc


@triton.jit
def _decode_kernel(
    query,
    cache,
    block_tables,
    context_lens,
    piece_len,
    starts,
    sequence_of,
    piece_of,
    partial,
    stats,
    num_seqs,
    table_width,
    query_stride,
    window,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    head = tl.program_id(0)
    length = tl.load(piece_len)
    num_pieces = tl.load(starts + num_seqs)
    rows, columns = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    in_group, in_dim = rows < GROUP, columns < DIM
    mask = in_group[:, None] & in_dim[None, :]
    for item in range(tl.program_id(1), num_pieces, tl.num_programs(1)):
        sequence = tl.load(sequence_of + item)
        context = tl.load(context_lens + sequence).to(tl.int32)
        begin = tl.load(piece_of + item) * length
        end = tl.minimum(begin + length, context)
        low = 0
        if window > 0:
            low = tl.maximum(context - window, 0)
        at = sequence.to(tl.int64) * query_stride + (head * GROUP + rows[:, None]) * DIM + columns[None, :]
        wide_type = tl.float32 if query.dtype.element_ty == tl.float32 else query.dtype.element_ty
        q = tl.load(query + at, mask, other=0.0).to(wide_type)
        largest = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_BLOCK,), tl.float32)
        acc = tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32)
        table = block_tables + sequence.to(tl.int64) * table_width
        first = tl.maximum(begin, low // KEYS * KEYS)
        for start in range(first, end, KEYS):
            positions = start + tl.arange(0, KEYS)
            inside = (positions < end) & (positions >= low)
            block = tl.load(table + positions // BLOCK_SIZE, inside, other=0)
            place = (block * BLOCK_SIZE + positions % BLOCK_SIZE) * (2 * NUM_KV_HEADS) + head
            offsets = place[:, None] * DIM + columns[None, :]
            loads = inside[:, None] & in_dim[None, :]
            keys = tl.load(cache + offsets, loads, other=0.0).to(q.dtype)
            values = tl.load(cache + NUM_KV_HEADS * DIM + offsets, loads, other=0.0).to(q.dtype)
            largest, total, acc = _turn(q, keys, values, inside[None, :], scale, largest, total, acc, PRECISION)
        row = (item * NUM_KV_HEADS + head) * GROUP + rows
        tl.store(partial + row[:, None] * DIM + columns[None, :], acc, mask)
        tl.store(stats + row * 2, largest, in_group)
        tl.store(stats + row * 2 + 1, total, in_group)


@triton.jit
def _merge_kernel(
    partial,
    stats,
    starts,
    out,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    sequence, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, DIM_BLOCK)
    inside = columns < DIM
    largest = float("-inf")
    total = 0.0
    acc = tl.zeros((DIM_BLOCK,), tl.float32)
    for item in range(tl.load(starts + sequence), tl.load(starts + sequence + 1)):
        row = item * NUM_HEADS + head
        top = tl.load(stats + row * 2)
        if top > float("-inf"):
            new = tl.maximum(largest, top)
            keep, add = tl.exp2(largest - new), tl.exp2(top - new)
            acc = acc * keep + tl.load(partial + row * DIM + columns, inside, other=0.0) * add
            total = total * keep + tl.load(stats + row * 2 + 1) * add
            largest = new
    to = out + (sequence.to(tl.int64) * NUM_HEADS + head) * DIM + columns
    tl.store(to, (acc / tl.where(total > 0.0, total, 1.0)).to(out.dtype.element_ty), inside)


def decode_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    split: DecodeSplit,
    window: int | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """One query token per sequence: query [sequences, heads, d], rows may be strided; a context of 0 gives zeros."""
    num_seqs, num_heads, dim = query.shape
    block_size, num_kv_heads = cache.shape[1], cache.shape[2] // 2
    group = num_heads // num_kv_heads
    most = split.sequence_of.shape[0]
    partial = torch.empty(most, num_heads, dim, dtype=torch.float32, device=query.device)
    stats = torch.empty(most, num_heads, 2, dtype=torch.float32, device=query.device)
    dim_block = triton.next_power_of_2(dim)
    _decode_kernel[(num_kv_heads, split.num_programs)](
        query,
        cache,
        block_tables,
        context_lens,
        split.piece_len,
        split.starts,
        split.sequence_of,
        split.piece_of,
        partial,
        stats,
        num_seqs,
        block_tables.stride(0),
        query.stride(0),
        window or 0,
        dim**-0.5 * LOG2E.value,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        DIM_BLOCK=dim_block,
        BLOCK_SIZE=block_size,
        KEYS=split.config.keys,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=split.config.num_warps,
        num_stages=split.config.num_stages,
        **launch_options(query),
    )
    _merge_kernel[(num_seqs, num_heads)](
        partial,
        stats,
        split.starts,
        out,
        NUM_HEADS=num_heads,
        DIM=dim,
        DIM_BLOCK=dim_block,
        num_warps=1,
        **launch_options(query),
    )
    return out


@triton.jit
def _prefill_kernel(
    query,
    cache,
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
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
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
    in_dim = columns < DIM
    mask = valid[:, None] & in_dim[None, :]
    heads = head * GROUP + rows % GROUP
    q = tl.load(
        query + (first_row + token)[:, None] * query_stride + heads[:, None] * DIM + columns[None, :], mask, other=0.0
    )
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM_BLOCK), tl.float32)
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
            block = tl.load(table + positions // BLOCK_SIZE)
            place = (block * BLOCK_SIZE + positions % BLOCK_SIZE) * (2 * NUM_KV_HEADS) + head
            offsets = place[:, None] * DIM + columns[None, :]
            if DIM == DIM_BLOCK:
                keys = tl.load(cache + offsets).to(q.dtype)
                values = tl.load(cache + NUM_KV_HEADS * DIM + offsets).to(q.dtype)
            else:
                keys = tl.load(cache + offsets, in_dim[None, :], other=0.0).to(q.dtype)
                values = tl.load(cache + NUM_KV_HEADS * DIM + offsets, in_dim[None, :], other=0.0).to(q.dtype)
            largest, total, acc = _turn(q, keys, values, None, scale, largest, total, acc, PRECISION)
    for start in range(masked_from, end, KEYS):
        positions = start + tl.arange(0, KEYS)
        known = positions < end
        block = tl.load(table + positions // BLOCK_SIZE, known, other=0)
        place = (block * BLOCK_SIZE + positions % BLOCK_SIZE) * (2 * NUM_KV_HEADS) + head
        offsets = place[:, None] * DIM + columns[None, :]
        loads = known[:, None] & in_dim[None, :]
        keys = tl.load(cache + offsets, loads, other=0.0).to(q.dtype)
        values = tl.load(cache + NUM_KV_HEADS * DIM + offsets, loads, other=0.0).to(q.dtype)
        inside = positions[None, :] <= own[:, None]
        if window > 0:
            inside &= positions[None, :] > own[:, None] - window
        largest, total, acc = _turn(q, keys, values, inside, scale, largest, total, acc, PRECISION)
    to = (first_row + token)[:, None] * (NUM_KV_HEADS * GROUP * DIM) + heads[:, None] * DIM + columns[None, :]
    tl.store(out + to, (acc / total[:, None]).to(out.dtype.element_ty), mask)


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
    cache: torch.Tensor,
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
    block_size, num_kv_heads = cache.shape[1], cache.shape[2] // 2
    group = num_heads // num_kv_heads
    tokens = tile_tokens(group)
    _prefill_kernel[(tiles.shape[0], num_kv_heads)](
        query,
        cache,
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
        DIM_BLOCK=triton.next_power_of_2(dim),
        BLOCK_SIZE=block_size,
        KEYS=PREFILL.keys,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=PREFILL.num_warps,
        num_stages=PREFILL.num_stages,
        **launch_options(query),
    )
    return out
