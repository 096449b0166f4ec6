"""What the tests of the native kernels share: the module, random packed weights, and their products in integers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from powertrain.kernels import native
from powertrain.kernels.attention import AttentionStep
from powertrain.kernels.cases import ProductCase
from powertrain.model.packed import FLOATS, Grid, PackedLayout, Part, native_matrix, pack, unpack

NATIVE: Any = native.load()
LEVELS: list[str] = NATIVE.levels() if NATIVE is not None else ["none"]
"""What this processor runs; a placeholder where the module is absent, so that skipped tests still have a name."""

needs_native = pytest.mark.skipif(NATIVE is None, reason=f"no native kernels: {native.unavailable()}")
each_level = pytest.mark.parametrize("level", LEVELS)

UNIT_ROUNDOFF = 2.0**-24


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_part(case: ProductCase, rows: int, seed: int) -> Part:
    """`rows` outputs of the case's format, codes from end to end of their range; padded inputs are not zero."""
    source = generator(seed)
    if case.kind in FLOATS:
        return torch.randn(rows, case.in_features, generator=source).to(FLOATS[case.kind])
    blocks = -(-case.in_features // 32)
    width = 16 if case.kind == "u4" else 32
    codes = torch.randint(0, 256, (rows, blocks, width), dtype=torch.uint8, generator=source)
    dtype = FLOATS[case.scale]
    scale = (torch.rand(rows, blocks // case.group_blocks, generator=source) * 0.02 + 0.001).to(dtype)
    minimum = (torch.randn(scale.shape, generator=source) * 0.1).to(dtype) if case.has_minimum else None
    return Grid(case.kind, case.in_features, codes, scale, minimum, case.quantizes_activations)


class Product(NamedTuple):
    """A native matrix and what it was made of."""

    matrix: Any
    stream: Tensor
    layout: PackedLayout
    grids: list[Part]

    def weights(self) -> Tensor:
        """float32 [out, in]."""
        return unpack(self.stream, self.layout)


def product(case: ProductCase, seed: int = 0) -> Product:
    """The case's matrix with random weights."""
    halves = 2 if case.is_gate_up else 1
    grids = [random_part(case, case.out_features // halves, seed + n) for n in range(halves)]
    stream, layout = pack(grids, case.is_gate_up)
    return Product(native_matrix(stream, layout, NATIVE), stream, layout, grids)


def run_at_once(work: Callable[[Any], None], each: Sequence[Any]) -> None:
    """`work` on every item, in a Python thread each; a thread that hangs fails the test."""
    workers = [threading.Thread(target=work, args=(item,)) for item in each]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()


def matmul(team: Any, matrix: Any, x: Tensor, out_features: int) -> Tensor:
    out = torch.full((x.shape[0], out_features), torch.nan)
    NATIVE.matmul(team, matrix, x, out)
    return out


class Expected(NamedTuple):
    """A product in float64, and how far a sum of float32 terms in any order may be from it, element by element."""

    value: Tensor
    bound: Tensor

    def exceeded_by(self, out: Tensor) -> bool:
        return not bool(((out.double() - self.value).abs() <= self.bound).all())


def expected_product(made: Product, x: Tensor) -> Expected:
    """x [rows, in] times the matrix, rounding only the activations, and only where the format says so."""
    if made.layout.quantizes_activations:
        parts = [_integer_product(grid, x) for grid in made.grids if isinstance(grid, Grid)]
        return Expected(*(torch.cat(side, dim=1) for side in zip(*parts, strict=True)))
    weights = made.weights().double()
    num_roundings = made.layout.in_features + 2
    return Expected(x.double() @ weights.t(), UNIT_ROUNDOFF * num_roundings * (x.double().abs() @ weights.abs().t()))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [rows, in] in blocks of 32: codes [rows, blocks, 32] and scales [rows, blocks]."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).view(x.shape[0], -1, 32)
    codes, scale = to_int8(blocks)
    return codes, scale.squeeze(-1)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] in 255 steps of its last axis: codes as float32, half-way cases to even, and scales [..., 1]."""
    largest = x.abs().amax(-1, keepdim=True)
    most = torch.full_like(largest, 127.0)  # torch divides a plain number by a tensor through the reciprocal
    return (x * torch.where(largest > 0, most / largest, 0.0)).round(), largest / most


def _integer_product(grid: Grid, x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_rows(x)
    if grid.kind == "u4":
        weights = torch.cat((grid.codes & 15, grid.codes >> 4), dim=-1).double()
        weights = weights if grid.minimum is not None else weights - 8
    else:
        weights = grid.codes.view(torch.int8).double()
    dots = torch.einsum("rbi,obi->rob", codes.double(), weights)
    repeats = dots.shape[2] // grid.scale.shape[1]
    scales = grid.scale.float().repeat_interleave(repeats, dim=1)
    terms = dots * (scales.unsqueeze(0) * scale.unsqueeze(1)).double()  # the kernels round this product of scales
    if grid.minimum is not None:
        minima = grid.minimum.double().repeat_interleave(repeats, dim=1)
        sums = (scale * codes.sum(-1)).double()
        terms = torch.cat((terms, minima.unsqueeze(0) * sums.unsqueeze(1)), dim=2)
    return terms.sum(-1), UNIT_ROUNDOFF * (terms.shape[2] + 2) * terms.abs().sum(-1)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


VOCAB = 320
"""Of the tiny models."""

BLOCK_SIZE = 16


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (count,), generator=generator(seed))


def step_of(sequences: Sequence[tuple[int, int]], tables: Sequence[Sequence[int]]) -> AttentionStep:
    """sequences: (tokens in this step, tokens after it) each; tables: their blocks."""
    width = max(len(table) for table in tables)
    padded = np.array([[*table, *[table[0]] * (width - len(table))] for table in tables], dtype=np.int64)
    queries, contexts = ([pair[at] for pair in sequences] for at in (0, 1))
    return AttentionStep(queries, contexts, padded, BLOCK_SIZE, torch.device("cpu"))
