"""Triton kernels for what lies between the matrix products: norms, rotation with the cache write, gated activation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powertrain.kernels.attention import AttentionStep, LayerCache, ScaledCache, entries, largest_entry
from powertrain.kernels.gpu.activation import gated
from powertrain.kernels.gpu.conversions import limit_of, round_row, round_to_integer
from powertrain.kernels.gpu.launch import launch, launch_options, wait_turn


@triton.jit(do_not_specialize=["piece_stride"])
def _add_rms_norm_kernel(
    x,
    delta,
    weight,
    out,
    num_columns,
    piece_stride,
    eps,
    rounded_scale,
    DELTAS: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * num_columns
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    # the only bytes that come from the memory and not from its cache: on their way before the turn
    own_weight = tl.load(weight + columns, inside, other=0.0)
    wait_turn(PDL)
    value = tl.load(x + row + columns, inside, other=0.0)
    if DELTAS > 0:
        total = tl.zeros((BLOCK,), tl.float32)
        for piece in tl.static_range(DELTAS):
            total += tl.load(delta + piece * piece_stride + row + columns, inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + total.to(value.dtype).to(tl.float32)).to(value.dtype)
        tl.store(x + row + columns, value, inside)
    wide = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide) / num_columns + eps)
    # rounded before the weight comes in, as the reference does
    normed = (wide * inverse).to(value.dtype).to(tl.float32)
    scaled = normed * own_weight.to(tl.float32)
    if LIMIT > 0.0:
        rounded, own = round_row(scaled.to(value.dtype).to(tl.float32), LIMIT, out.dtype.element_ty == tl.int8)
        tl.store(rounded_scale + tl.program_id(0), own)
        tl.store(out + row + columns, rounded.to(out.dtype.element_ty), inside)
    else:
        tl.store(out + row + columns, scaled.to(value.dtype), inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`kernels.fused.rms_norm` of contiguous rows."""
    return _norm(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, before_narrow: bool = False
) -> torch.Tensor:
    """`kernels.fused.add_rms_norm` of contiguous rows, or of a product's pieces, which are summed in their order."""
    return _norm(x, delta, weight, eps, is_late=before_narrow)[0]


def add_rms_norm_rounded(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, to: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.rounding.add_rms_norm_rounded` of contiguous rows."""
    return _norm(x, delta, weight, eps, to, is_late=True)


def _norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    to: torch.dtype | None = None,
    is_late: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm in x's dtype, or rounded `to` 8 bits with its scales, which else mean nothing."""
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=to or x.dtype, device=x.device)
    scale = weight if to is None else torch.empty(x.numel() // width, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    deltas = 0 if delta is None else delta.shape[0] if delta.ndim > x.ndim else 1
    grid = (x.numel() // width,)
    launch(_add_rms_norm_kernel, grid)(
        x,
        delta,
        weight,
        out,
        width,
        x.numel(),
        eps,
        scale,
        DELTAS=deltas,
        LIMIT=0.0 if to is None else limit_of(to),
        BLOCK=block,
        # a thread has few loads on their way at a time: for pieces there are more threads
        num_warps=_num_warps(block) if deltas < 2 else min(32, max(1, block // 128)),
        **launch_options(x, is_late=is_late),
    )
    return out, scale


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit
def _silu_mul_kernel(gate_up, out, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, inside, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + columns, inside, other=0.0)
    tl.store(out + row * width + columns, gated(gate, up, gate.dtype).to(gate.dtype), inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`kernels.fused.silu_mul` of contiguous rows."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    block = min(1024, triton.next_power_of_2(width))
    launch(_silu_mul_kernel, (rows, triton.cdiv(width, block)))(
        gate_up, out, width, BLOCK=block, num_warps=4, **launch_options(gate_up)
    )
    return out


@triton.jit
def _silu_mul_rounded_kernel(gate_up, out, scale, width, LIMIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, inside, other=0.0)
    up = tl.load(gate_up + row * 2 * width + width + columns, inside, other=0.0)
    product = gated(gate, up, gate.dtype).to(gate.dtype).to(tl.float32)
    value, own = round_row(product, LIMIT, out.dtype.element_ty == tl.int8)
    tl.store(scale + row, own)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), inside)


def silu_mul_rounded(gate_up: torch.Tensor, to: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.rounding.silu_mul_rounded` of contiguous rows."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=to, device=gate_up.device)
    scale = torch.empty(rows, dtype=torch.float32, device=gate_up.device)
    block = triton.next_power_of_2(width)
    launch(_silu_mul_rounded_kernel, (rows,))(
        gate_up,
        out,
        scale,
        width,
        LIMIT=limit_of(to),
        BLOCK=block,
        num_warps=_num_warps(block),
        **launch_options(gate_up),
    )
    return out, scale


HEADS_AT_ONCE = 8
"""Of a token: a program for each would take its place and go in less time than the next needs to come."""


@triton.jit(do_not_specialize=["piece_stride"], do_not_specialize_on_alignment=["slots"])
def _norm_rope_write_kernel(
    qkv,
    out,
    cos,
    sin,
    query_norm,
    key_norm,
    cache,
    scales,
    slots,
    piece_stride,
    eps,
    PIECES: tl.constexpr,
    OUT_HEADS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BY_HEAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    LARGEST_ENTRY: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    token, heads = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half: tl.constexpr = DIM // 2
    columns = tl.arange(0, HALF_BLOCK)
    inside = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (columns < half)[None, :]
    at = qkv + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + heads[:, None]) * DIM + columns[None, :]
    dtype: tl.constexpr = cos.dtype.element_ty
    low = tl.load(at, inside, other=0.0).to(tl.float32)
    high = tl.load(at + half, inside, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, PIECES):
        at += piece_stride
        low += tl.load(at, inside, other=0.0)
        high += tl.load(at + half, inside, other=0.0)
    if PIECES > 1:
        # rounded where the product is, were it whole
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
    is_query, is_value = heads < NUM_HEADS, heads >= NUM_HEADS + NUM_KV_HEADS
    turned, high_turned = low, high
    if HAS_NORM:
        inverse = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM + eps)[:, None]
        turned = (turned * inverse).to(dtype).to(tl.float32)
        high_turned = (high_turned * inverse).to(dtype).to(tl.float32)
        norm = tl.where(is_query[:, None], query_norm + columns[None, :], key_norm + columns[None, :])
        turned = (turned * tl.load(norm, inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        high_turned = (high_turned * tl.load(norm + half, inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    # the tables repeat the halves, and the first half of sin is negated
    c = tl.load(cos + token * DIM + columns, columns < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * DIM + half + columns, columns < half, other=0.0).to(tl.float32)[None, :]
    low = tl.where(is_value[:, None], low, turned * c - high_turned * s).to(dtype).to(tl.float32)
    high = tl.where(is_value[:, None], high, high_turned * c + turned * s).to(dtype).to(tl.float32)
    # keys and values are read from the cache alone
    own_query = out + (token * OUT_HEADS + heads[:, None]) * DIM + columns[None, :]
    tl.store(own_query, low.to(dtype), inside & is_query[:, None])
    tl.store(own_query + half, high.to(dtype), inside & is_query[:, None])
    slot = tl.load(slots + token)
    if slot >= 0:  # a padded row of a graph has no place
        block, position = slot // BLOCK_SIZE * (BLOCK_SIZE * 2 * NUM_KV_HEADS), slot % BLOCK_SIZE
        if BY_HEAD:
            place = block + (heads - NUM_HEADS) * BLOCK_SIZE + position
        else:
            place = block + position * (2 * NUM_KV_HEADS) + heads - NUM_HEADS
        mask = inside & (heads >= NUM_HEADS)[:, None]
        if LARGEST_ENTRY > 0.0:
            own = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1)) / LARGEST_ENTRY
            own = tl.where(own == 0.0, 1.0, own)
            tl.store(scales + place, own, (heads >= NUM_HEADS) & (heads < NUM_HEADS + 2 * NUM_KV_HEADS))
            low = tl.clamp(low / own[:, None], -LARGEST_ENTRY, LARGEST_ENTRY)
            high = tl.clamp(high / own[:, None], -LARGEST_ENTRY, LARGEST_ENTRY)
            if cache.dtype.element_ty == tl.int8:
                low, high = round_to_integer(low), round_to_integer(high)
        to = cache + place[:, None] * DIM + columns[None, :]
        tl.store(to, low.to(cache.dtype.element_ty), mask)
        tl.store(to + half, high.to(cache.dtype.element_ty), mask)


def rotate_and_write(
    qkv: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    cache: LayerCache,
    step: AttentionStep,
) -> torch.Tensor:
    """`kernels.attention.rotate_and_write`; a negative slot writes nothing."""
    num_tokens, num_heads_all, dim = qkv.shape[-3:]
    stored = entries(cache)
    num_kv_heads = stored.shape[2] // 2
    num_heads = num_heads_all - 2 * num_kv_heads
    cos, sin = rope
    query_norm, key_norm = norms if norms is not None else (None, None)
    # pieces are float32: what they sum to has a place of its own
    is_whole = qkv.ndim == 3
    out = qkv if is_whole else torch.empty(num_tokens, num_heads, dim, dtype=cos.dtype, device=qkv.device)
    launch(_norm_rope_write_kernel, (num_tokens, triton.cdiv(num_heads_all, HEADS_AT_ONCE)))(
        qkv,
        out,
        cos,
        sin,
        query_norm,
        key_norm,
        stored,
        cache.scales if isinstance(cache, ScaledCache) else stored,
        step.slots,
        num_tokens * num_heads_all * dim,
        eps,
        PIECES=1 if is_whole else qkv.shape[0],
        OUT_HEADS=out.shape[1],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        DIM=dim,
        HALF_BLOCK=triton.next_power_of_2(dim // 2),
        HEADS=HEADS_AT_ONCE,
        BLOCK_SIZE=stored.shape[1],
        BY_HEAD=not stored.is_contiguous(),
        HAS_NORM=norms is not None,
        LARGEST_ENTRY=largest_entry(stored.dtype) if isinstance(cache, ScaledCache) else 0.0,
        num_warps=2,
        **launch_options(qkv),
    )
    return out[:, :num_heads]
