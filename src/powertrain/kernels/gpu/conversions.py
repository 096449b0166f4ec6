"""Triton conversions between the weights' formats: in registers, of a whole matrix, and of activations to 8 bits.

Unpacking follows Kim et al. 2022 (arXiv 2211.10017): the bits of a small integer behind a fixed exponent are a float,
an offset apart; two of them cost as much as one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powertrain.kernels.gpu.launch import device_function, launch, launch_options, wait_turn
from powertrain.kernels.quantized import FLOAT8_BLOCK, Int4Blocks
from powertrain.kernels.rounding import INT8_STEPS, LARGEST_FLOAT8

# The nibbles of 4 bytes to bfloat16 or float16, two in a register, as 128 + n or 1024 + n less an offset: first the
# low, then the high
_NIBBLES_OF_BYTES = """{
    .reg .b32 low, high, exponent;
    mov.b32 exponent, EXPONENT;
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, exponent, 0x4140;
    prmt.b32 $1, low, exponent, 0x4342;
    prmt.b32 $2, high, exponent, 0x4140;
    prmt.b32 $3, high, exponent, 0x4342;
    mov.b32 exponent, OFFSET;
    sub.rn.TYPE $0, $0, exponent;
    sub.rn.TYPE $1, $1, exponent;
    sub.rn.TYPE $2, $2, exponent;
    sub.rn.TYPE $3, $3, exponent;
}"""
# The same of two words of 16 bits: each nibble beside that of the other word. 0xEA: (a & b) | c
_NIBBLES_OF_WORDS = """{
    .reg .b32 word, exponent;
    mov.b32 exponent, EXPONENT;
    lop3.b32 $0, $4, 0x000F000F, exponent, 0xEA;
    shr.u32 word, $4, 4;
    lop3.b32 $1, word, 0x000F000F, exponent, 0xEA;
    shr.u32 word, $4, 8;
    lop3.b32 $2, word, 0x000F000F, exponent, 0xEA;
    shr.u32 word, $4, 12;
    lop3.b32 $3, word, 0x000F000F, exponent, 0xEA;
    mov.b32 exponent, OFFSET;
    sub.rn.TYPE $0, $0, exponent;
    sub.rn.TYPE $1, $1, exponent;
    sub.rn.TYPE $2, $2, exponent;
    sub.rn.TYPE $3, $3, exponent;
}"""


def _fill(text: str, exponent: str, offset: str, type_name: str) -> tl.constexpr:
    return tl.constexpr(text.replace("EXPONENT", exponent).replace("OFFSET", offset).replace("TYPE", type_name))


_FOUR = tl.constexpr("=r,=r,=r,=r,r")
_BYTES_TO_BFLOAT16 = _fill(_NIBBLES_OF_BYTES, "0x43434343", "0x43084308", "bf16x2")
_BYTES_TO_FLOAT16 = _fill(_NIBBLES_OF_BYTES, "0x64646464", "0x64086408", "f16x2")
_WORDS_TO_BFLOAT16 = _fill(_NIBBLES_OF_WORDS, "0x43004300", "0x43084308", "bf16x2")
_WORDS_TO_FLOAT16 = _fill(_NIBBLES_OF_WORDS, "0x64006400", "0x64086408", "f16x2")
# 4 floats of 8 bits in a register to 4 bfloat16 in two. A byte under 8 copies of its sign, moved up by 4, has all its
# bits in place, the copies where more of the exponent would be; which is then off by 120
_FLOAT8_TO_BFLOAT16 = """{
    .reg .b32 first, second, factor;
    mov.b32 factor, 0x7B807B80;
    prmt.b32 first, $2, 0, FIRST;
    prmt.b32 second, $2, 0, SECOND;
    shl.b32 first, first, 4;
    shl.b32 second, second, 4;
    and.b32 first, first, 0x87F087F0;
    and.b32 second, second, 0x87F087F0;
    mul.rn.bf16x2 $0, first, factor;
    mul.rn.bf16x2 $1, second, factor;
}"""
_FLOAT8_IN_ORDER = tl.constexpr(_FLOAT8_TO_BFLOAT16.replace("FIRST", "0x9180").replace("SECOND", "0xB3A2"))
# the low and the high bytes of two 16-bit elements, 8-bit floats each, to two float16
_FLOAT8_BY_HALF = tl.constexpr("""{
    .reg .b32 bytes;
    .reg .b16 low, high;
    prmt.b32 bytes, $2, 0, 0x3120;
    mov.b32 {low, high}, bytes;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")
# the same of 8-bit integers: 128 more than they are, behind the exponent of 1024
_INT8_BY_HALF = tl.constexpr("""{
    .reg .b32 bytes, exponent, offset;
    mov.b32 exponent, 0x64646464;
    mov.b32 offset, 0x64806480;
    xor.b32 bytes, $2, 0x80808080;
    prmt.b32 $0, bytes, exponent, 0x4240;
    prmt.b32 $1, bytes, exponent, 0x4341;
    sub.rn.f16x2 $0, $0, offset;
    sub.rn.f16x2 $1, $1, offset;
}""")


@device_function
def unpack_nibbles(packed, dtype: tl.constexpr, IS_COMPILED: tl.constexpr):
    """The nibbles of words of 8 or 16 bits less 8, as floats: one tensor for each nibble, the lowest first."""
    # the types of several results have to be written out
    if packed.dtype == tl.int16 and IS_COMPILED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _WORDS_TO_BFLOAT16,
            _FOUR,
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif packed.dtype == tl.int16 and IS_COMPILED and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _WORDS_TO_FLOAT16,
            _FOUR,
            [packed],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif packed.dtype == tl.int16:
        return (
            _nibble(packed, 0, dtype),
            _nibble(packed, 4, dtype),
            _nibble(packed, 8, dtype),
            _nibble(packed, 12, dtype),
        )
    elif IS_COMPILED and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BYTES_TO_BFLOAT16, _FOUR, [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif IS_COMPILED and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _BYTES_TO_FLOAT16, _FOUR, [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        return _nibble(packed, 0, dtype), _nibble(packed, 4, dtype)


@device_function
def _nibble(packed, SHIFT: tl.constexpr, dtype: tl.constexpr):
    return (((packed.to(tl.int32) >> SHIFT) & 15) - 8).to(dtype)


@device_function
def widen_bytes(weight, dtype: tl.constexpr, IS_COMPILED: tl.constexpr):
    """8-bit integers or floats as floats, exactly."""
    if IS_COMPILED and weight.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_FLOAT8_IN_ORDER, "=r,=r,r", [weight], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return weight.to(tl.float32).to(dtype) if weight.dtype == tl.float8e4nv else weight.to(dtype)


@device_function
def widen_pairs(pairs, stored: tl.constexpr, dtype: tl.constexpr, IS_COMPILED: tl.constexpr):
    """The low and the high bytes of int16, 8-bit integers or floats (`stored`), as floats, exactly."""
    if IS_COMPILED and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _FLOAT8_BY_HALF if stored == tl.float8e4nv else _INT8_BY_HALF,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low, high = pairs.to(tl.int8).to(stored, bitcast=True), (pairs >> 8).to(tl.int8).to(stored, bitcast=True)
        return widen_bytes(low, dtype, IS_COMPILED), widen_bytes(high, dtype, IS_COMPILED)


@device_function
def round_to_integer(value):
    """float32 to the nearest integer, halves to even: this much added and taken away does it below 2^22."""
    return (value + 12582912.0) - 12582912.0


@device_function
def round_row(value, LIMIT: tl.constexpr, IS_INTEGER: tl.constexpr):
    """A row of float32 on its own grid of 8 bits, as float32, and the grid's scale."""
    own = tl.max(tl.abs(value), 0) / LIMIT
    own = tl.where(own == 0.0, 1.0, own)
    value = value / own
    if IS_INTEGER:
        return tl.clamp(round_to_integer(value), -128.0, 127.0), own
    else:
        return tl.clamp(value, -LIMIT, LIMIT), own


def limit_of(dtype: torch.dtype) -> float:
    """What a row's largest value is divided by for its scale."""
    return INT8_STEPS if dtype == torch.int8 else LARGEST_FLOAT8


@triton.jit
def _quantize_rows_kernel(
    x, values, scale, width, x_stride, LIMIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    wait_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * x_stride + columns, inside, other=0.0).to(tl.float32)
    value, own = round_row(value, LIMIT, values.dtype.element_ty == tl.int8)
    tl.store(values + row * width + columns, value.to(values.dtype.element_ty), inside)
    tl.store(scale + row, own)


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, n] as int8 or float8_e4m3fn [rows, n] and float32 scales [rows].

    The grids of `kernels.rounding.quantize_to_float8` and `quantize_to_int8` with one group a row.
    """
    rows, width = x.shape
    values = torch.empty(rows, width, dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    launch(_quantize_rows_kernel, (rows,))(
        x,
        values,
        scale,
        width,
        x.stride(0),
        LIMIT=limit_of(dtype),
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        **launch_options(x),
    )
    return values, scale


def scale_integers(
    product: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """int32 [rows, n] times row_scale [rows] and column_scale [n], in `dtype`."""
    rows, width = product.shape
    out = torch.empty(rows, width, dtype=dtype, device=product.device)
    launch(_scale_integers_kernel, (rows, triton.cdiv(width, 1024)))(
        product, row_scale, column_scale, out, width, BLOCK=1024, num_warps=4, **launch_options(product)
    )
    return out


@triton.jit
def _scale_integers_kernel(product, row_scale, column_scale, out, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_turn(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(product + row * width + columns, inside, other=0).to(tl.float32)
    value *= tl.load(row_scale + row) * tl.load(column_scale + columns, inside, other=0.0)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), inside)


@triton.jit
def _int4_floats_kernel(
    values,
    scale,
    zero,
    out,
    out_features,
    num_blocks,
    WORDS: tl.constexpr,
    NIBBLES: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    OUTPUTS: tl.constexpr,
    IS_COMPILED: tl.constexpr,
):
    block = tl.program_id(0)
    columns = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = (columns < out_features)[:, None]
    word = tl.arange(0, WORDS)[None, :]
    of_group = block // GROUP_BLOCKS * out_features + columns
    packed = tl.load(values + (block.to(tl.int64) * out_features + columns[:, None]) * WORDS + word, inside, other=0)
    weights = unpack_nibbles(packed, out.dtype.element_ty, IS_COMPILED)
    own = tl.load(scale + of_group, columns < out_features, other=0.0).to(tl.float32)[:, None]
    if HAS_ZERO:
        offset = tl.load(zero + of_group, columns < out_features, other=0).to(tl.float32)[:, None]
    to = out + columns.to(tl.int64)[:, None] * (num_blocks * NIBBLES * WORDS) + block * (NIBBLES * WORDS) + word
    for nibble in tl.static_range(NIBBLES):
        weight = weights[nibble].to(tl.float32)
        if HAS_ZERO:
            weight -= offset
        tl.store(to + nibble * WORDS, (weight * own).to(out.dtype.element_ty), inside)


def int4_floats(weight: Int4Blocks, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize_int4_blocks` in one pass."""
    num_blocks, out_features, words = weight.values.shape
    in_features = num_blocks * words * weight.nibbles
    out = torch.empty(out_features, in_features, dtype=dtype, device=weight.values.device)
    launch(_int4_floats_kernel, (num_blocks, triton.cdiv(out_features, 64)))(
        weight.values,
        weight.scale,
        weight.zero if weight.zero is not None else weight.values,
        out,
        out_features,
        num_blocks,
        WORDS=words,
        NIBBLES=weight.nibbles,
        GROUP_BLOCKS=num_blocks // weight.scale.shape[0],
        HAS_ZERO=weight.zero is not None,
        OUTPUTS=64,
        IS_COMPILED=out.is_cuda,
    )
    return out


@triton.jit
def _byte_floats_kernel(values, scale, out, width, SCALE_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = row.to(tl.int64) * width + columns
    value = tl.load(values + at, inside, other=0.0).to(tl.float32)
    if SCALE_BLOCK > 0:
        own = tl.load(
            scale + row // SCALE_BLOCK * tl.cdiv(width, SCALE_BLOCK) + columns // SCALE_BLOCK, inside, other=0
        )
    else:
        own = tl.load(scale + row)
    tl.store(out + at, (value * own).to(out.dtype.element_ty), inside)


def byte_floats(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] behind 8-bit integers or floats (see `byte_linear`)."""
    rows, width = values.shape
    out = torch.empty(rows, width, dtype=dtype, device=values.device)
    launch(_byte_floats_kernel, (rows, triton.cdiv(width, 2048)))(
        values, scale, out, width, SCALE_BLOCK=FLOAT8_BLOCK if scale.ndim == 2 else 0, BLOCK=2048
    )
    return out
