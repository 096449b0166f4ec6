"""Triton products of a single row: each weight is multiplied in the thread that loaded it, without the tensor cores.

Those want 16 rows, and laying out fifteen that are not there takes longer than the memory needs for narrow weights. A
thread here holds runs of 16 bytes of a few outputs; its sums meet those of other threads once, at the end. The first
weights are loaded before the kernel's turn, the next while the last are multiplied. Only where settings were measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from powertrain.kernels.gpu.activation import gated
from powertrain.kernels.gpu.launch import device_function, launch, launch_options, wait_turn
from powertrain.kernels.gpu.tuned_table import entry
from powertrain.kernels.quantized import Int4Blocks

# 8 nibbles of a word to float32, as 128 + n or 2048 + n: where one lies in the mantissa under a fixed exponent it is a
# float, an offset apart, and nibbles beside each other need one shift together. 0xEA: (a & b) | c
_NIBBLES = tl.constexpr("""{
    .reg .b32 down, up, first, last;
    shl.b32 first, $8, 12;
    shl.b32 up, $8, 8;
    shr.u32 down, $8, 8;
    shr.u32 last, $8, 12;
    lop3.b32 $0, first, 0x0000F000, 0x45000000, 0xEA;
    lop3.b32 $1, up, 0x0000F000, 0x45000000, 0xEA;
    lop3.b32 $2, up, 0x000F0000, 0x43000000, 0xEA;
    lop3.b32 $3, $8, 0x0000F000, 0x45000000, 0xEA;
    lop3.b32 $4, $8, 0x000F0000, 0x43000000, 0xEA;
    lop3.b32 $5, down, 0x0000F000, 0x45000000, 0xEA;
    lop3.b32 $6, down, 0x000F0000, 0x43000000, 0xEA;
    lop3.b32 $7, last, 0x000F0000, 0x43000000, 0xEA;
}""")
_FLOAT8S = tl.constexpr("""{
    .reg .b16 low, high, first, second, third, fourth;
    .reg .b32 pair, other;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 pair, low;
    cvt.rn.f16x2.e4m3x2 other, high;
    mov.b32 {first, second}, pair;
    mov.b32 {third, fourth}, other;
    cvt.f32.f16 $0, first;
    cvt.f32.f16 $1, second;
    cvt.f32.f16 $2, third;
    cvt.f32.f16 $3, fourth;
}""")


class RowConfig(NamedTuple):
    """Launch settings: outputs and inputs of one turn, warps."""

    outputs: int
    inputs: int
    num_warps: int


@device_function
def _half(word, AT: tl.constexpr, dtype: tl.constexpr):
    """The 16-bit float at bit 16 * AT of integers, as float32."""
    if dtype == tl.bfloat16:
        pair = (word >> (AT // 2 * 32)).to(tl.int32)
        return ((pair << 16) if AT % 2 == 0 else (pair & -65536)).to(tl.float32, bitcast=True)
    else:
        return (word >> (16 * AT)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@device_function
def _byte(word, AT: tl.constexpr, dtype: tl.constexpr):
    """The 8-bit number at bit 8 * AT of integers, as float32."""
    return (word >> (8 * AT)).to(tl.int8).to(dtype, bitcast=True).to(tl.float32)


@device_function
def _bytes(word, stored: tl.constexpr, IS_COMPILED: tl.constexpr):
    """The four 8-bit numbers of a word, as float32."""
    if stored == tl.float8e4nv and IS_COMPILED:
        return tl.inline_asm_elementwise(
            _FLOAT8S,
            "=f,=f,=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return _byte(word, 0, stored), _byte(word, 1, stored), _byte(word, 2, stored), _byte(word, 3, stored)


@device_function
def _add_words(acc, word, x, stored: tl.constexpr, dtype: tl.constexpr, IS_COMPILED: tl.constexpr):
    """acc and the products of a word's elements with as many of x, 16 bits each, which lie in one integer."""
    if stored == dtype:
        return acc + _half(word, 0, dtype) * _half(x, 0, dtype) + _half(word, 1, dtype) * _half(x, 1, dtype)
    else:
        weights = _bytes(word, stored, IS_COMPILED)
        for at in tl.static_range(4):
            acc += weights[at] * _half(x, at, dtype)
        return acc


@triton.jit
def _row_kernel(
    x,
    values,
    scale,
    out,
    out_features,
    num_words,
    stored: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    GATED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    WORDS: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    """values: words of 32 bits [outputs, num_words]; x: integers of as many elements as a word has."""
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.minimum(columns, out_features - 1)
    word = tl.arange(0, WORDS)
    at = values + column.to(tl.int64)[:, None] * num_words + word[None, :]
    half = out_features.to(tl.int64) * num_words
    inside = (word < num_words)[None, :]
    # older than any kernel under way: these can come while it still runs
    weight = tl.load(at, inside, other=0, eviction_policy="evict_first")
    up_weight = tl.load(at + half, inside, other=0, eviction_policy="evict_first") if GATED else weight
    of_output = tl.load(scale + column) if HAS_SCALE else 1.0
    up_of_output = tl.load(scale + out_features + column) if HAS_SCALE and GATED else 1.0
    wait_turn(PDL)
    acc = tl.zeros((OUTPUTS, WORDS), tl.float32)
    up = tl.zeros((OUTPUTS, WORDS), tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    for start in range(0, num_words, WORDS):
        inside = (start + WORDS + word < num_words)[None, :]
        ahead = tl.load(at + start + WORDS, inside, other=0, eviction_policy="evict_first")
        up_ahead = ahead
        if GATED:
            up_ahead = tl.load(at + half + start + WORDS, inside, other=0, eviction_policy="evict_first")
        a = tl.load(x + start + word, start + word < num_words, other=0)[None, :]
        acc = _add_words(acc, weight, a, stored, dtype, IS_COMPILED)
        if GATED:
            up = _add_words(up, up_weight, a, stored, dtype, IS_COMPILED)
        weight, up_weight = ahead, up_ahead
    total = tl.sum(acc, 1) * of_output
    if GATED:
        total = gated(total, tl.sum(up, 1) * up_of_output, dtype)
    tl.store(out + columns, total.to(dtype), columns < out_features)


@device_function
def _load_blocks(values, blocks, stride, num_blocks):
    """Words [blocks, outputs, words], of the block that `values` [outputs, words] points to and those after it."""
    at = values[None, :, :] + (blocks.to(tl.int64) * stride)[:, None, None]
    return tl.load(at, (blocks < num_blocks)[:, None, None], other=0, eviction_policy="evict_first")


@device_function
def _load_scales(scale, blocks, num_blocks, outputs, GROUP_BLOCKS: tl.constexpr):
    """[blocks, outputs], of those that `scale` [outputs] points to in the first group."""
    at = scale[None, :] + (blocks // GROUP_BLOCKS * outputs)[:, None]
    return tl.load(at, (blocks < num_blocks)[:, None], other=0)


@device_function
def _nibbles(word, IS_COMPILED: tl.constexpr):
    """Of words of 32 bits, from the lowest up, as float32: each an offset more, 2048 for 0, 1, 3 and 5, else 128."""
    if IS_COMPILED:
        return tl.inline_asm_elementwise(
            _NIBBLES,
            "=f,=f,=f,=f,=f,=f,=f,=f,r",
            [word],
            dtype=(
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
            ),
            is_pure=True,
            pack=1,
        )
    else:
        return (
            (word & 15).to(tl.float32) + 2048.0,
            ((word >> 4) & 15).to(tl.float32) + 2048.0,
            ((word >> 8) & 15).to(tl.float32) + 128.0,
            ((word >> 12) & 15).to(tl.float32) + 2048.0,
            ((word >> 16) & 15).to(tl.float32) + 128.0,
            ((word >> 20) & 15).to(tl.float32) + 2048.0,
            ((word >> 24) & 15).to(tl.float32) + 128.0,
            ((word >> 28) & 15).to(tl.float32) + 128.0,
        )


@device_function
def _add_blocks(acc, packed, scale, zero, x, less, HAS_ZERO: tl.constexpr, IS_COMPILED: tl.constexpr):
    """acc [blocks, outputs, words] with what these blocks add.

    x: the 8 inputs of each word [blocks, 1, words], by nibble from the lowest up; less: what the offsets and 8 add.
    """
    weights = _nibbles(packed, IS_COMPILED)
    part = weights[0] * x[0] - less
    for nibble in tl.static_range(1, 8):
        part += weights[nibble] * x[nibble]
    if HAS_ZERO:
        whole = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
        part -= zero.to(tl.float32)[:, :, None] * whole
    return acc + part * scale.to(tl.float32)[:, :, None]


@triton.jit
def _row_int4_kernel(
    x,
    values,
    scale,
    zero,
    out,
    out_features,
    num_blocks,
    WORDS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    GATED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PDL: tl.constexpr,
):
    """values: words of 32 bits [blocks, outputs, words], two of `Int4Blocks` each; x: integers of two elements."""
    columns = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.minimum(columns, out_features - 1)
    block, word = tl.arange(0, BLOCKS), tl.arange(0, WORDS)
    all_outputs = out_features * 2 if GATED else out_features
    stride = all_outputs * WORDS
    own = values + column[:, None] * WORDS + word[None, :]
    up_own = own + out_features * WORDS
    of_output, up_of_output = scale + column, scale + out_features + column
    # older than any kernel under way: these can come while it still runs
    packed = _load_blocks(own, block, stride, num_blocks)
    scales = _load_scales(of_output, block, num_blocks, all_outputs, GROUP_BLOCKS)
    up_packed, up_scales = packed, scales
    if GATED:
        up_packed = _load_blocks(up_own, block, stride, num_blocks)
        up_scales = _load_scales(up_of_output, block, num_blocks, all_outputs, GROUP_BLOCKS)
    wait_turn(PDL)
    dtype: tl.constexpr = out.dtype.element_ty
    acc = tl.zeros((BLOCKS, OUTPUTS, WORDS), tl.float32)
    up = tl.zeros((BLOCKS, OUTPUTS, WORDS), tl.float32)
    for first in range(0, num_blocks, BLOCKS):
        ahead = first + BLOCKS + block
        next_packed = _load_blocks(own, ahead, stride, num_blocks)
        next_scales = _load_scales(of_output, ahead, num_blocks, all_outputs, GROUP_BLOCKS)
        next_up, next_up_scales = next_packed, next_scales
        if GATED:
            next_up = _load_blocks(up_own, ahead, stride, num_blocks)
            next_up_scales = _load_scales(up_of_output, ahead, num_blocks, all_outputs, GROUP_BLOCKS)
        zeros, up_zeros = scales, up_scales
        if HAS_ZERO:
            zeros = _load_scales(zero + column, first + block, num_blocks, all_outputs, GROUP_BLOCKS)
            if GATED:
                up_zeros = _load_scales(
                    zero + out_features + column, first + block, num_blocks, all_outputs, GROUP_BLOCKS
                )
        at = x + ((first + block) * (4 * WORDS))[:, None, None] + word[None, None, :]
        is_block = (first + block < num_blocks)[:, None, None]
        pairs = (
            tl.load(at, is_block, other=0),
            tl.load(at + WORDS, is_block, other=0),
            tl.load(at + 2 * WORDS, is_block, other=0),
            tl.load(at + 3 * WORDS, is_block, other=0),
        )
        a = (
            _half(pairs[0], 0, dtype),
            _half(pairs[1], 0, dtype),
            _half(pairs[2], 0, dtype),
            _half(pairs[3], 0, dtype),
            _half(pairs[0], 1, dtype),
            _half(pairs[1], 1, dtype),
            _half(pairs[2], 1, dtype),
            _half(pairs[3], 1, dtype),
        )
        less = 2056.0 * ((a[0] + a[1]) + (a[3] + a[5])) + 136.0 * ((a[2] + a[4]) + (a[6] + a[7]))
        acc = _add_blocks(acc, packed, scales, zeros, a, less, HAS_ZERO, IS_COMPILED)
        if GATED:
            up = _add_blocks(up, up_packed, up_scales, up_zeros, a, less, HAS_ZERO, IS_COMPILED)
        packed, scales, up_packed, up_scales = next_packed, next_scales, next_up, next_up_scales
    total = tl.sum(tl.sum(acc, 2), 0)
    if GATED:
        total = gated(total, tl.sum(tl.sum(up, 2), 0), dtype)
    tl.store(out + columns, total.to(dtype), columns < out_features)


def row_config(product: str, x: torch.Tensor, out_features: int, is_gated: bool) -> RowConfig | None:
    """The measured settings of a single row's `product`; None where there are none or it was slower."""
    if x.shape[0] != 1 or x.dtype != torch.bfloat16:
        return None
    found = entry(f"{product} bfloat16", x.device, (out_features, x.shape[1], 1, is_gated))
    return None if found is None else RowConfig(*(found[field] for field in RowConfig._fields))


def row_product(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None, config: RowConfig, is_gated: bool = False
) -> torch.Tensor:
    """x [1, in], 16-bit floats, times the transposed values [out, in], contiguous: int8, float8_e4m3fn, or x's dtype.

    scale: float32 [out] or None. `is_gated` as in `gated_linear`. `in` is a multiple of a word's elements.
    """
    out_features = values.shape[0] // 2 if is_gated else values.shape[0]
    out = torch.empty(1, out_features, dtype=x.dtype, device=x.device)
    words, of_word = values.view(torch.int32), 4 // values.element_size()
    launch(_row_kernel, (triton.cdiv(out_features, config.outputs),))(
        x.view(torch.int64 if of_word == 4 else torch.int32),
        words,
        scale if scale is not None else words,
        out,
        out_features,
        words.shape[1],
        stored=_TYPES[values.dtype],
        HAS_SCALE=scale is not None,
        WORDS=config.inputs // of_word,
        **_options(x, config, is_gated),
    )
    return out


def row_int4_product(x: torch.Tensor, weight: Int4Blocks, config: RowConfig, is_gated: bool = False) -> torch.Tensor:
    """x [1, in], 16-bit floats, times the transposed matrix, whose words hold 4 nibbles; as `row_product`."""
    words = weight.values.view(torch.int32)
    num_blocks, all_outputs, count = words.shape
    out_features = all_outputs // 2 if is_gated else all_outputs
    out = torch.empty(1, out_features, dtype=x.dtype, device=x.device)
    launch(_row_int4_kernel, (triton.cdiv(out_features, config.outputs),))(
        x.view(torch.int32),
        words,
        weight.scale,
        weight.zero if weight.zero is not None else words,
        out,
        out_features,
        num_blocks,
        WORDS=count,
        GROUP_BLOCKS=num_blocks // weight.scale.shape[0],
        HAS_ZERO=weight.zero is not None,
        BLOCKS=max(1, config.inputs // (8 * count)),
        **_options(x, config, is_gated),
    )
    return out


_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def _options(x: torch.Tensor, config: RowConfig, is_gated: bool) -> dict[str, Any]:
    own = {"GATED": is_gated, "OUTPUTS": config.outputs, "IS_COMPILED": x.is_cuda, "num_warps": config.num_warps}
    return {**own, **launch_options(x)}
