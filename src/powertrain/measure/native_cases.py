"""The native kernels' matrix products at a model's shapes, as cases of one op whose reference unpacks the matrix."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from powertrain.kernels import native
from powertrain.kernels.cases import Case
from powertrain.kernels.model_cases import Workload
from powertrain.kernels.op import Op, Provider
from powertrain.model.packed import BLOCK, FLOATS, Grid, PackedLayout, PackedMatrix, Part, pack
from powertrain.types import PowertrainError

NATIVE_OP = "native_linear"

_FORMATS: dict[str, dict[str, Any]] = {
    "q4_1": {"kind": "u4", "group_blocks": 1, "has_minimum": True, "quantizes_activations": True},
    "q8_0": {"kind": "s8", "group_blocks": 1, "quantizes_activations": True},
    "w4a16": {"kind": "u4", "group_blocks": 1},
    "bf16": {"kind": "bf16"},
}
# of the float product of the same weights: activations rounded to 8 bits, or sums in another order
_ROUNDED, _EXACT = 2e-2, 1e-5


def native_cases(work: Workload, threads: int) -> list[Case]:
    """x [rows, in] float32 times a packed matrix of each format, for the model's four products, on `threads` threads.

    Raises `PowertrainError` where the native module is not built.
    """
    module = native.load()
    if module is None:
        raise PowertrainError(f"{NATIVE_OP}: {native.unavailable()}")
    team = module.Team(threads, module.levels()[0])
    op = Op(NATIVE_OP, _reference, (Provider("native", _native_linear, lambda x, matrix: None),))

    def make(layout: PackedLayout, rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        stream, _ = pack([_random_part(layout, generator)])
        return torch.randn(rows, layout.in_features, generator=generator), PackedMatrix(stream, layout, module, team)

    made = []
    for name, fields in _FORMATS.items():
        for product in ("qkv", "o", "gate_up", "down"):
            out, inner = work.products()[product]
            layout = PackedLayout(out_features=out, in_features=inner, **fields)
            rounds = layout.quantizes_activations
            made += [
                Case(
                    op,
                    f"{product} {rows}x{inner}x{out} {name}",
                    partial(make, layout, rows),
                    _ROUNDED if rounds else _EXACT,
                    layout.num_bytes + 4 * rows * (out + inner),
                    2 * rows * out * inner,
                    has_float_peak=not rounds,
                )
                for rows in work.rows
            ]
    return made


def _reference(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """x [rows, in] times the transposed matrix, in float32."""
    return x @ matrix.unpack().float().t()


def _native_linear(x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    return matrix.matmul(x)


def _random_part(layout: PackedLayout, generator: torch.Generator) -> Part:
    out, inner = layout.out_features, layout.in_features
    if layout.kind in FLOATS:
        return torch.randn(out, inner, generator=generator).to(FLOATS[layout.kind])
    width = BLOCK // 2 if layout.kind == "u4" else BLOCK
    codes = torch.randint(0, 256, (out, layout.num_blocks, width), dtype=torch.uint8, generator=generator)
    groups = layout.num_blocks // layout.group_blocks
    scale = (torch.rand(out, groups, generator=generator) * 0.01 + 0.001).to(FLOATS[layout.scale])
    minimum = -8 * scale if layout.has_minimum else None
    return Grid("u4" if layout.kind == "u4" else "s8", inner, codes, scale, minimum, layout.quantizes_activations)
