"""Paged attention of decodes in Triton: one query token a sequence, its context split over the processors.

Follows flash decoding (Dao et al. 2023): every context is cut into pieces of one length, a fixed number of programs
works off the list of all pieces, and a second kernel merges each row's pieces in order. The list is made on the device,
so that a captured graph serves any lengths; the pieces grow with the sum of the contexts, so that ragged batches are
shared out evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powertrain.kernels.attention import LayerCache, ScaledCache, entries
from powertrain.kernels.gpu.attention_tile import LOG2E, attend, dim_block_of, in_parts, joined
from powertrain.kernels.gpu.launch import launch, launch_options, wait_turn

MERGED_AT_ONCE = 8


class DecodeConfig(NamedTuple):
    """Launch settings of decodes: positions of one turn, pieces to aim at for each processor, warps, stages."""

    keys: int
    pieces: int
    num_warps: int
    num_stages: int


MEASURED = DecodeConfig(64, 4, 2, 2)
"""Of those tried on an H100 the fastest, or within 2 % of it, from 1 to 256 sequences of 1k, for 16 bits and 8."""


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


_PIECES = ["context_lens", "piece_len", "starts", "sequence_of", "piece_of"]
"""Parts of one tensor: where they begin depends on the number of rows, for which nothing shall be compiled anew."""


@triton.jit(do_not_specialize=["num_seqs", "target"], do_not_specialize_on_alignment=_PIECES)
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
    config: DecodeConfig = MEASURED,
) -> DecodeSplit:
    """Cut contexts, int64 [sequences] on the device and at most `max_context` each.

    `fixed` is a piece's length that depends on nothing else, so that neither do a row's bits; 0 cuts for speed.
    """
    num_seqs = context_lens.shape[0]
    target = max(1, config.pieces * num_processors // num_kv_heads)
    most = num_seqs * triton.cdiv(max_context, fixed) if fixed else target + num_seqs
    device = context_lens.device
    empty = torch.empty(1 + num_seqs + 1 + 2 * most, dtype=torch.int32, device=device)
    piece_len, starts, sequence_of, piece_of = empty.split((1, num_seqs + 1, most, most))
    launch(_split_kernel, (num_seqs,))(
        context_lens,
        piece_len,
        starts,
        sequence_of,
        piece_of,
        num_seqs,
        target,
        FIXED=fixed,
        BLOCK=max(512, triton.next_power_of_2(num_seqs)),
        num_warps=1,
        **launch_options(context_lens),
    )
    return DecodeSplit(piece_len, starts, sequence_of, piece_of, min(most, 2 * target), config)


@triton.jit(do_not_specialize=["num_seqs", "table_width", "window"], do_not_specialize_on_alignment=_PIECES)
def _decode_kernel(
    query,
    cache,
    scales,
    block_tables,
    context_lens,
    piece_len,
    starts,
    sequence_of,
    piece_of,
    partial,
    stats,
    out,
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
    BY_HEAD: tl.constexpr,
    KEYS: tl.constexpr,
    IS_SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    head = tl.program_id(0)
    length = tl.load(piece_len)
    num_pieces = tl.load(starts + num_seqs)
    rows, columns = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    in_group = rows < GROUP
    mask = in_group[:, None] & (columns < DIM)[None, :]
    for item in range(tl.program_id(1), num_pieces, tl.num_programs(1)):
        sequence = tl.load(sequence_of + item)
        context = tl.load(context_lens + sequence).to(tl.int32)
        begin = tl.load(piece_of + item) * length
        end = tl.minimum(begin + length, context)
        low = 0
        if window > 0:
            low = tl.maximum(context - window, 0)
        at = sequence.to(tl.int64) * query_stride + (head * GROUP + rows[:, None]) * DIM + columns[None, :]
        q = in_parts(tl.load(query + at, mask, other=0.0), IS_SCALED)
        largest = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP_BLOCK,), tl.float32)
        acc = in_parts(tl.zeros((GROUP_BLOCK, DIM_BLOCK), tl.float32), IS_SCALED)
        table = block_tables + sequence.to(tl.int64) * table_width
        first = tl.maximum(begin, low // KEYS * KEYS)
        for start in range(first, end, KEYS):
            positions = start + tl.arange(0, KEYS)
            inside = (positions < end) & (positions >= low)
            largest, total, acc = attend(
                q,
                cache,
                scales,
                table,
                positions,
                inside,
                inside[None, :],
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
        acc = joined(acc, IS_SCALED)
        if context <= length:
            # in one piece: there is nothing to merge it with
            own = (sequence.to(tl.int64) * NUM_KV_HEADS + head) * GROUP + rows
            result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
            tl.store(out + own[:, None] * DIM + columns[None, :], result.to(out.dtype.element_ty), mask)
        else:
            row = (item * NUM_KV_HEADS + head) * GROUP + rows
            tl.store(partial + row[:, None] * DIM + columns[None, :], acc, mask)
            tl.store(stats + row * 2, largest, in_group)
            tl.store(stats + row * 2 + 1, total, in_group)


@triton.jit(do_not_specialize_on_alignment=["starts"])
def _merge_kernel(
    partial,
    stats,
    starts,
    out,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    sequence, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, DIM_BLOCK)
    largest = float("-inf")
    total = 0.0
    acc = tl.zeros((DIM_BLOCK,), tl.float32)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    is_whole = end - begin == 1
    # several at once, whose loads do not wait for each other; none where one piece is all, which is in place
    for first in range(begin, begin if is_whole else end, PIECES):
        item = first + tl.arange(0, PIECES)
        row = item * NUM_HEADS + head
        tops = tl.load(stats + row * 2, item < end, other=float("-inf"))
        sums = tl.load(stats + row * 2 + 1, item < end, other=0.0)
        mask = (item < end)[:, None] & (columns < DIM)[None, :]
        parts = tl.load(partial + row[:, None] * DIM + columns[None, :], mask, other=0.0)
        new = tl.maximum(largest, tl.max(tops, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        keep, add = tl.exp2(largest - safe), tl.exp2(tops - safe)
        acc = acc * keep + tl.sum(parts * add[:, None], 0)
        total = total * keep + tl.sum(sums * add, 0)
        largest = new
    to = out + (sequence.to(tl.int64) * NUM_HEADS + head) * DIM + columns
    result = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(to, result.to(out.dtype.element_ty), (columns < DIM) & (end - begin != 1))


def decode_attention(
    query: torch.Tensor,
    cache: LayerCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    split: DecodeSplit,
    window: int | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """One query token per sequence: query [sequences, heads, d], rows may be strided; a context of 0 gives zeros."""
    num_seqs, num_heads, dim = query.shape
    stored = entries(cache)
    block_size, num_kv_heads = stored.shape[1], stored.shape[2] // 2
    group = num_heads // num_kv_heads
    most = split.sequence_of.shape[0]
    partial = torch.empty(most, num_heads, dim, dtype=torch.float32, device=query.device)
    stats = torch.empty(most, num_heads, 2, dtype=torch.float32, device=query.device)
    dim_block = dim_block_of(dim)
    launch(_decode_kernel, (num_kv_heads, split.num_programs))(
        query,
        stored,
        cache.scales if isinstance(cache, ScaledCache) else stored,
        block_tables,
        context_lens,
        split.piece_len,
        split.starts,
        split.sequence_of,
        split.piece_of,
        partial,
        stats,
        out,
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
        BY_HEAD=not stored.is_contiguous(),
        KEYS=split.config.keys,
        IS_SCALED=isinstance(cache, ScaledCache),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        IS_COMPILED=query.is_cuda,
        num_warps=split.config.num_warps,
        num_stages=split.config.num_stages,
        **launch_options(query),
    )
    launch(_merge_kernel, (num_seqs, num_heads))(
        partial,
        stats,
        split.starts,
        out,
        NUM_HEADS=num_heads,
        DIM=dim,
        DIM_BLOCK=dim_block,
        PIECES=MERGED_AT_ONCE,
        num_warps=1,
        **launch_options(query),
    )
    return out
