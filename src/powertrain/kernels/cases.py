"""One table of cases per op: shapes, tolerance, bytes and operations. Tests, benchmarks and tuning read it.

`cases` has arguments for the torch ops, which the native kernels of the same name take as well. Products with packed
matrices and attention over the native cache are the native kernels' own: `product_cases` and `attention_cases`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from powertrain.kernels.fused import apply_rope, rms_norm, silu_mul
from powertrain.kernels.matmul import int4_linear, int8_linear
from powertrain.kernels.op import Op


@dataclass(frozen=True)
class Case:
    """Arguments for one op. `tolerance` is ||out - reference|| / ||reference|| a provider may reach at most.

    `num_bytes` counts each input read once and each output written once; `num_flops` multiplies and adds. `written`:
    places of the arguments that the op writes and that must be right as well. `make` takes its generator's device.
    """

    op: Op[Any, torch.Tensor]
    label: str
    make: Callable[[torch.Generator], tuple[Any, ...]]
    tolerance: float
    num_bytes: int
    num_flops: int
    written: tuple[int, ...] = ()
    has_float_peak: bool = True
    """Whether the peak of floating-point products bounds it; that of narrow integers and 8-bit floats is higher."""


# the default model's products: attention output, gate-up and down, and a row length no power of two divides
_SHAPES = ((576, 576), (3072, 576), (576, 1536), (96, 160))
# 172 is the inner width of stories260k: torch's kernel reads past the end of such rows
_ODD_SHAPES = ((64, 172), (30, 64))
_ROWS = (1, 3, 16, 65)
# torch's packed kernels take bfloat16 activations: 8 bits of mantissa, averaged over a row
_BF16 = 5e-3


@dataclass(frozen=True)
class ProductCase:
    """x [rows, in] times a packed matrix [out, in]; the fields from `kind` on are those of `PackedLayout`.

    `tolerance` is ||out - reference|| / ||reference||: of the unpacked matrix for float activations, of the same
    integers for activations that are rounded to 8 bits.
    """

    label: str
    kind: Literal["u4", "s8", "f32", "f16", "bf16"]
    rows: int = 1
    out_features: int = 40
    in_features: int = 256
    group_blocks: int = 0
    scale: Literal["f16", "f32"] = "f16"
    has_minimum: bool = False
    is_gate_up: bool = False
    quantizes_activations: bool = False
    tolerance: float = 1e-6

    @property
    def num_bytes(self) -> int:
        """Weights, scales and activations, each once; without padding."""
        weights = self.out_features * self.in_features
        if not self.group_blocks:
            return weights * (4 if self.kind == "f32" else 2) + self._activation_bytes
        headers = self.out_features * -(-self.in_features // (32 * self.group_blocks)) * (1 + self.has_minimum)
        return weights // (2 if self.kind == "u4" else 1) + headers * int(self.scale[1:]) // 8 + self._activation_bytes

    @property
    def num_flops(self) -> int:
        return 2 * self.rows * self.out_features * self.in_features

    @property
    def _activation_bytes(self) -> int:
        return 4 * self.rows * (self.out_features + self.in_features)


@dataclass(frozen=True)
class AttentionCase:
    """One step of paged attention, a sequence per entry of `query_lens` and `context_lens`; `window` 0 is none."""

    label: str
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    window: int
    tolerance: float = 3e-6

    @property
    def num_bytes(self) -> int:
        """Queries, outputs and the keys and values that are visible, as float32."""
        visible = sum(self._visible(query, context) for query, context in self._sequences)
        heads = self.num_heads * sum(self.query_lens) + self.num_kv_heads * visible
        return 4 * 2 * self.head_dim * heads

    @property
    def num_flops(self) -> int:
        pairs = sum(
            min(position + 1, self.window or context)
            for query, context in self._sequences
            for position in range(context - query, context)
        )
        return 4 * self.num_heads * self.head_dim * pairs

    @property
    def _sequences(self) -> list[tuple[int, int]]:
        return list(zip(self.query_lens, self.context_lens, strict=True))

    def _visible(self, query: int, context: int) -> int:
        return min(context, self.window + query - 1) if self.window else context


# every way a checkpoint's weights come to the native kernels
_FORMATS = (
    ProductCase("q4_1", "u4", group_blocks=1, has_minimum=True, quantizes_activations=True),
    ProductCase("q4_0", "u4", group_blocks=1, quantizes_activations=True),
    ProductCase("q8_0", "s8", group_blocks=1, quantizes_activations=True),
    ProductCase("w4a8 g64", "u4", group_blocks=2, scale="f32", quantizes_activations=True),
    ProductCase(
        "w4a8 g128 asymmetric", "u4", group_blocks=4, scale="f32", has_minimum=True, quantizes_activations=True
    ),
    ProductCase("w8a8 g64 asymmetric", "s8", group_blocks=2, has_minimum=True, quantizes_activations=True),
    ProductCase("w4a16 g32", "u4", group_blocks=1, scale="f32"),
    ProductCase("w4a16 g128 asymmetric", "u4", group_blocks=4, has_minimum=True),
    ProductCase("w8a16 g64 asymmetric", "s8", group_blocks=2, scale="f32", has_minimum=True),
)
_CHANNEL_FORMATS = (
    ProductCase("w4a8", "u4", group_blocks=-1, quantizes_activations=True),
    ProductCase("w8a8", "s8", group_blocks=-1, scale="f32", quantizes_activations=True),
    ProductCase("w4a16 asymmetric", "u4", group_blocks=-1, scale="f32", has_minimum=True),
    ProductCase("w8a16", "s8", group_blocks=-1, scale="f32"),
)
_FLOAT_FORMATS = (ProductCase("f32", "f32"), ProductCase("f16", "f16"), ProductCase("bf16", "bf16"))
# around the kernels' tiles: 1 and 2 rows alone, 4 together, 64 to one unpacking of the weights
_NATIVE_ROWS = (1, 2, 3, 4, 5, 7, 16, 63, 64, 65, 130)
# around their panels of 16 outputs and units of 64; 1040 is more than a thread's share of small units
_OUTPUTS = (1, 17, 64, 70, 1040)
# no whole block, more than one buffer of 64 inputs, an odd row
_INPUTS = (1, 33, 64, 65, 172)


def product_cases() -> list[ProductCase]:
    """Every case of the native products, smallest first."""
    made = []
    for base in (*_FORMATS, *_CHANNEL_FORMATS, *_FLOAT_FORMATS):
        made += [replace(base, rows=rows) for rows in _NATIVE_ROWS]
        made += [replace(base, rows=rows, out_features=out, in_features=128) for out in _OUTPUTS for rows in (1, 3)]
        made += [replace(base, rows=rows, out_features=576, in_features=640) for rows in (1, 9)]
        made += [
            replace(base, rows=rows, out_features=2 * half, is_gate_up=True)
            for half, rows in ((16, 1), (40, 1), (40, 5), (72, 66))
        ]
    for base in (*_CHANNEL_FORMATS, *_FLOAT_FORMATS):
        made += [replace(base, rows=rows, in_features=inner) for inner in _INPUTS for rows in (1, 6)]
    return sorted((_named(case) for case in made), key=lambda case: case.num_flops)


def _named(case: ProductCase) -> ProductCase:
    """With its shape in its label, and one group a row resolved to the number of blocks."""
    gate_up = " gate-up" if case.is_gate_up else ""
    label = f"{case.label} {case.rows}x{case.in_features}x{case.out_features}{gate_up}"
    blocks = -(-case.in_features // 32)
    return replace(case, label=label, group_blocks=blocks if case.group_blocks < 0 else case.group_blocks)


# query and context lengths: a decode that is split, decodes of many lengths, chunks among decodes, a whole prompt
_STEPS = (
    ((1,), (1000,)),
    ((1, 1, 1, 1, 1, 1), (1, 16, 17, 257, 512, 255)),
    ((1, 1, 5, 16, 70), (256, 513, 5, 40, 333)),
    ((70,), (70,)),
    ((1,), (513,)),
    ((1, 1, 2, 33), (15, 300, 256, 257)),
)
_HEADS = (
    (2, 1, 2),
    (3, 1, 8),
    (4, 4, 16),
    (8, 2, 48),
    (9, 3, 64),
    (4, 1, 80),
    (8, 1, 128),
    (4, 2, 10),
    (2, 2, 256),
    (64, 1, 4),
)
_BLOCK_SIZES = (16, 32, 48)
_WINDOWS = (0, 24, 300)


def attention_cases() -> list[AttentionCase]:
    """Every case of native attention, smallest first: each shape of heads meets every block size and window."""
    made = []
    for at, (heads, kv_heads, dim) in enumerate(_HEADS):
        for turn in range(3):
            queries, contexts = _STEPS[(at + 2 * turn) % len(_STEPS)]
            block_size, window = _BLOCK_SIZES[turn], _WINDOWS[(at + turn) % 3]
            label = f"{heads}/{kv_heads}x{dim} {'+'.join(map(str, queries))} of {'+'.join(map(str, contexts))}"
            label += f" b{block_size} w{window}"
            made.append(AttentionCase(label, queries, contexts, heads, kv_heads, dim, block_size, window))
    return sorted(made, key=lambda case: case.num_flops)


def _int8(rows: int, out: int, inner: int) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        values = torch.randint(-128, 128, (out, inner), dtype=torch.int8, generator=generator)
        scale = torch.rand(out, generator=generator) * 0.01 + 0.001
        return torch.randn(rows, inner, generator=generator), values, scale

    num_bytes = out * inner + 4 * (out + rows * (out + inner))
    return Case(int8_linear, f"{rows}x{inner}x{out}", make, _BF16, num_bytes, 2 * rows * out * inner)


def _int4(rows: int, out: int, inner: int, group_size: int) -> Case:
    def make(generator: torch.Generator) -> tuple[Any, ...]:
        unsigned = torch.randint(0, 16, (out, inner), dtype=torch.uint8, generator=generator)
        nibbles = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
        scale = torch.rand(inner // group_size, out, 2, generator=generator) * 0.01
        packed = torch._convert_weight_to_int4pack_for_cpu(unsigned.to(torch.int32), 1)
        x = torch.randn(rows, inner, generator=generator)
        return x, packed, nibbles, scale.to(torch.bfloat16), group_size

    num_bytes = out * inner // 2 + 4 * out * inner // group_size + 4 * rows * (out + inner)
    label = f"{rows}x{inner}x{out} g{group_size}"
    return Case(int4_linear, label, make, _BF16, num_bytes, 2 * rows * out * inner)


def _elementwise(rows: int, width: int) -> list[Case]:
    def norm(generator: torch.Generator) -> tuple[Any, ...]:
        return torch.randn(rows, width, generator=generator), torch.rand(width, generator=generator), 1e-5

    def gate(generator: torch.Generator) -> tuple[Any, ...]:
        return (torch.randn(rows, 2 * width, generator=generator),)

    def rope(generator: torch.Generator) -> tuple[Any, ...]:
        angles = torch.rand(rows, 1, 32, generator=generator) * 6
        cos, sin = angles.cos(), angles.sin()
        x = torch.randn(rows, 12, 64, generator=generator)
        return x, torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    return [
        Case(rms_norm, f"{rows}x{width}", norm, 1e-6, 4 * width * (2 * rows + 1), 4 * rows * width),
        Case(silu_mul, f"{rows}x{width}", gate, 1e-6, 12 * rows * width, 4 * rows * width),
        Case(apply_rope, f"{rows}x12x64", rope, 1e-6, 8 * rows * 13 * 64, 3 * rows * 12 * 64),
    ]


def cases() -> list[Case]:
    """Every case, smallest products first."""
    made = [_int8(rows, out, inner) for rows in _ROWS for out, inner in (*_SHAPES, *_ODD_SHAPES)]
    made += [_int4(rows, out, inner, 64) for rows in _ROWS for out, inner in _SHAPES if inner % 64 == 0]
    made += [_int4(rows, out, inner, 32) for rows in _ROWS for out, inner in _SHAPES]
    for rows, width in ((1, 576), (7, 96), (64, 1536), (3, 1), (5, 37), (2, 172)):
        made += _elementwise(rows, width)
    return sorted(made, key=lambda case: case.num_flops)
