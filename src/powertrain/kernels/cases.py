"""One table of cases per op: shapes, tolerance, bytes and operations. Tests, benchmarks and tuning read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from powertrain.kernels.fused import apply_rope, rms_norm, silu_mul
from powertrain.kernels.matmul import int4_linear, int8_linear
from powertrain.kernels.op import Op


@dataclass(frozen=True)
class Case:
    """Arguments for one op. `tolerance` is ||out - reference|| / ||reference|| a provider may reach at most.

    `num_bytes` counts each input read once and each output written once; `num_flops` multiplies and adds.
    """

    op: Op[Any, torch.Tensor]
    label: str
    make: Callable[[torch.Generator], tuple[Any, ...]]
    tolerance: float
    num_bytes: int
    num_flops: int


# the default model's products: attention output, gate-up and down, and a row length no power of two divides
_SHAPES = ((576, 576), (3072, 576), (576, 1536), (96, 160))
# 172 is the inner width of stories260k: torch's kernel reads past the end of such rows
_ODD_SHAPES = ((64, 172), (30, 64))
_ROWS = (1, 3, 16, 65)
# torch's packed kernels take bfloat16 activations: 8 bits of mantissa, averaged over a row
_BF16 = 5e-3


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
        angles = torch.rand(rows, 1, 64, generator=generator)
        return torch.randn(rows, 12, 64, generator=generator), angles.cos(), angles.sin()

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
    for rows, width in ((1, 576), (7, 96), (64, 1536)):
        made += _elementwise(rows, width)
    return sorted(made, key=lambda case: case.num_flops)
