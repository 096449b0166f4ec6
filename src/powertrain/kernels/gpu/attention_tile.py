"""What decodes and prompts share: one tile of keys and values from the paged cache, folded into a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from powertrain.kernels.gpu.conversions import widen_bytes

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
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
    HAS_MASK: tl.constexpr,
    IS_SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):
    """Fold one tile of keys and values into the running maximum, sum and weighted values of query [rows, columns].

    `HAS_MASK`: some positions are not `known` or some columns are not the head's, which are not read. `inside` says
    which rows see which positions, None for all. `IS_SCALED`: `scales` holds one for each key and value of the cache.
    """
    columns = tl.arange(0, query.shape[1])
    if HAS_MASK:
        block = tl.load(table + positions // BLOCK_SIZE, known, other=0)
    else:
        block = tl.load(table + positions // BLOCK_SIZE)
    place = (block * BLOCK_SIZE + positions % BLOCK_SIZE) * (2 * NUM_KV_HEADS) + head
    at = cache + place[:, None] * DIM + columns[None, :]
    if HAS_MASK:
        loads = known[:, None] & (columns < DIM)[None, :]
        keys = tl.load(at, loads, other=0.0)
        values = tl.load(at + NUM_KV_HEADS * DIM, loads, other=0.0)
    else:
        keys = tl.load(at)
        values = tl.load(at + NUM_KV_HEADS * DIM)
    keys = widen_bytes(keys, query.dtype, IS_COMPILED)
    values = widen_bytes(values, query.dtype, IS_COMPILED)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    if IS_SCALED:
        scores *= tl.load(scales + place)[None, :]
    if inside is not None:
        scores = tl.where(inside, scores, float("-inf"))
    top = tl.maximum(largest, tl.max(scores, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores - safe[:, None])
    keep = tl.exp2(largest - safe)
    total = total * keep + tl.sum(weights, 1)
    if IS_SCALED:
        weights *= tl.load(scales + place + NUM_KV_HEADS)[None, :]
    acc = acc * keep[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return top, total, acc
