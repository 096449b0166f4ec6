"""What decodes and prompts share: one tile of keys and values from the paged cache, folded into a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain.kernels.gpu.conversions import widen_pairs
from powertrain.kernels.gpu.launch import device_function

LOG2E = tl.constexpr(1.4426950408889634)


def dim_block_of(dim: int) -> int:
    """The columns of a tile, a power of two: 16 at least in each of two parts, for a product over them."""
    columns: int = triton.next_power_of_2(dim)
    return max(32, columns)


@device_function
def in_parts(x, IS_SCALED: tl.constexpr):
    """Rows as `attend` takes them: the even and the odd columns if the cache holds 8 bits, else all.

    Those are widened to float16, which takes fewer instructions than bfloat16 and holds them as exactly.
    """
    if IS_SCALED:
        if x.dtype == tl.bfloat16:
            x = x.to(tl.float16)
        return tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    else:
        return (x,)


@device_function
def joined(parts, IS_SCALED: tl.constexpr):
    """What `in_parts` took apart."""
    if IS_SCALED:
        return tl.interleave(parts[0], parts[1])
    else:
        return parts[0]


@device_function
def _load_parts(at, mask, stored: tl.constexpr, dtype: tl.constexpr, IS_COMPILED: tl.constexpr):
    tile = tl.load(at) if mask is None else tl.load(at, mask, other=0)
    if tile.dtype == stored:
        return (tile.to(dtype),)
    else:
        return widen_pairs(tile, stored, dtype, IS_COMPILED)


@device_function
def attend(
    query,
    cache,
    scales,
    table,
    positions,
    known,
    inside,
    head,
    scale,
    largest,
    total,
    acc,
    NUM_KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BY_HEAD: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IS_SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):
    """Fold one tile of keys and values into the running maximum, sum and weighted values of query [rows, columns].

    `BY_HEAD`: the cache's layout. `HAS_MASK`: some positions are not `known` or some columns are not the head's, which
    are not read. `inside` says which rows see which positions, None for all. `IS_SCALED`: the cache holds 8 bits, and
    `scales` one for each key and value. Shared memory is read transposed, as a product wants its values, in elements of
    16 bits or else byte by byte; so two columns are one element, `query` and `acc` are `in_parts`, and each part is a
    product of its own.
    """
    dtype: tl.constexpr = query[0].dtype
    stored: tl.constexpr = cache.dtype.element_ty
    WIDTH: tl.constexpr = DIM // 2 if IS_SCALED else DIM
    columns = tl.arange(0, query[0].shape[1])
    if HAS_MASK:
        block = tl.load(table + positions // BLOCK_SIZE, known, other=0)
        mask = known[:, None] & (columns < WIDTH)[None, :]
    else:
        block = tl.load(table + positions // BLOCK_SIZE)
        mask = None
    POSITION: tl.constexpr = 1 if BY_HEAD else 2 * NUM_KV_HEADS
    HEAD: tl.constexpr = BLOCK_SIZE if BY_HEAD else 1
    place = block * (BLOCK_SIZE * 2 * NUM_KV_HEADS) + positions % BLOCK_SIZE * POSITION + head * HEAD
    base = cache.to(tl.pointer_type(tl.int16), bitcast=True) if IS_SCALED else cache
    at = base + place[:, None] * WIDTH + columns[None, :]
    keys = _load_parts(at, mask, stored, dtype, IS_COMPILED)
    values = _load_parts(at + NUM_KV_HEADS * HEAD * WIDTH, mask, stored, dtype, IS_COMPILED)
    scores = tl.dot(query[0], tl.trans(keys[0]), input_precision=PRECISION)
    if IS_SCALED:
        scores = tl.dot(query[1], tl.trans(keys[1]), scores, input_precision=PRECISION)
        scores *= (tl.load(scales + place) * scale)[None, :]
    else:
        scores *= scale
    if inside is not None:
        scores = tl.where(inside, scores, float("-inf"))
    top = tl.maximum(largest, tl.max(scores, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores - safe[:, None])
    keep = tl.exp2(largest - safe)
    total = total * keep + tl.sum(weights, 1)
    if IS_SCALED:
        weights *= tl.load(scales + place + NUM_KV_HEADS * HEAD)[None, :]
    weights = weights.to(dtype)
    first = acc[0] * keep[:, None] + tl.dot(weights, values[0], input_precision=PRECISION)
    if IS_SCALED:
        return top, total, (first, acc[1] * keep[:, None] + tl.dot(weights, values[1], input_precision=PRECISION))
    else:
        return top, total, (first,)
