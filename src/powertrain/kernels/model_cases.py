"""Cases at a model's own shapes, for measuring: `MODEL_CASES` has one entry an op.

Arguments are made on the generator's device, floats in the workload's dtype. A product is the model's qkv, o, gate_up,
down or head; another way to hold a matrix is another `_Matrix`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from powertrain.kernels.attention import AttentionStep, paged_attention, rotate_and_write
from powertrain.kernels.cases import AttentionCase, Case
from powertrain.kernels.fused import add_rms_norm, rms_norm, silu_mul
from powertrain.kernels.matmul import dense_linear, gated_linear, int4_linear, int8_linear
from powertrain.kernels.op import Op
from powertrain.kernels.quantized import (
    FLOAT8_BLOCK,
    Int4Blocks,
    float8_linear,
    int4_blocks_linear,
    int8_rounded_linear,
    pack_int4_blocks,
)

TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 2e-6}
"""Of an op whose arguments are of that type, against its reference in float32."""

# a kernel of stored integers may take its activations in bfloat16, whatever the dtype
_QUANTIZED = 5e-3
# a kernel may leave out the rounding of activations to 8 bits that its reference has
_ROUNDED = 5e-2
_BLOCK_SIZE = 16


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its ops depend on."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float = 1e-5
    has_qk_norm: bool = False


MODEL_SHAPES = {
    "smollm2-135m": ModelShape(576, 1536, 9, 3, 64, 49152),
    "qwen3-0.6b": ModelShape(1024, 3072, 16, 8, 128, 151936, 1e-6, has_qk_norm=True),
    "llama-3.1-8b": ModelShape(4096, 14336, 32, 8, 128, 128256),
}


@dataclass(frozen=True)
class Workload:
    """Steps of a model: each number of `rows` at once, `context` tokens each; prompts in chunks of `chunk` tokens."""

    model: ModelShape
    dtype: torch.dtype
    rows: tuple[int, ...]
    context: int = 1024
    chunk: int = 512

    def products(self) -> dict[str, tuple[int, int]]:
        """Shape [out, in] of each product by its name."""
        own = self.model
        heads = own.num_heads * own.head_dim
        return {
            "qkv": (heads + 2 * own.num_kv_heads * own.head_dim, own.hidden_size),
            "o": (own.hidden_size, heads),
            "gate_up": (2 * own.intermediate_size, own.hidden_size),
            "down": (own.hidden_size, own.intermediate_size),
            "head": (own.vocab_size, own.hidden_size),
        }


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)


def _norms(op: Op[Any, torch.Tensor], work: Workload) -> list[Case]:
    """`rms_norm`, or `add_rms_norm`, which has the residual to add and its sum to write besides."""
    width, eps = work.model.hidden_size, work.model.rms_norm_eps
    adds = op is add_rms_norm

    def make(rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        tensors = [_normal(generator, work.dtype, rows, width) for _ in range(2 if adds else 1)]
        return *tensors, _normal(generator, work.dtype, width), eps

    return [
        Case(
            op,
            f"{rows}x{width}",
            partial(make, rows),
            TOLERANCE[work.dtype],
            work.dtype.itemsize * width * ((4 if adds else 2) * rows + 1),
            (5 if adds else 4) * rows * width,
            written=(0,) if adds else (),
        )
        for rows in work.rows
    ]


def _silu_mul(work: Workload) -> list[Case]:
    width = work.model.intermediate_size

    def make(rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        return (_normal(generator, work.dtype, rows, 2 * width),)

    return [
        Case(
            silu_mul,
            f"{rows}x{width}",
            partial(make, rows),
            TOLERANCE[work.dtype],
            3 * work.dtype.itemsize * rows * width,
            4 * rows * width,
        )
        for rows in work.rows
    ]


def _step(query_lens: list[int], context_lens: list[int], device: torch.device) -> tuple[AttentionStep, int]:
    """A step whose blocks lie in a random order, and how many they are."""
    width = -(-max(context_lens) // _BLOCK_SIZE)
    num_blocks = len(query_lens) * width
    tables = np.random.default_rng(0).permutation(num_blocks).reshape(-1, width)
    return AttentionStep(query_lens, context_lens, tables, _BLOCK_SIZE, device), num_blocks


def _rotate_and_write(work: Workload) -> list[Case]:
    own = work.model
    dim, written = own.head_dim, own.num_heads + 2 * own.num_kv_heads

    def make(rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        angles = 6 * torch.rand(rows, 1, dim // 2, generator=generator, device=generator.device)
        cos, sin = angles.cos(), angles.sin()
        rope = (torch.cat((cos, cos), -1).to(work.dtype), torch.cat((-sin, sin), -1).to(work.dtype))
        norms = (_normal(generator, work.dtype, dim), _normal(generator, work.dtype, dim)) if own.has_qk_norm else None
        # of one block a sequence, empty but for this step, so that an error is not lost among what stays
        step, num_blocks = _step([1] * rows, [_BLOCK_SIZE] * rows, generator.device)
        cache = torch.zeros(
            num_blocks, _BLOCK_SIZE, 2 * own.num_kv_heads, dim, device=generator.device, dtype=work.dtype
        )
        return _normal(generator, work.dtype, rows, written, dim), rope, norms, own.rms_norm_eps, cache, step

    return [
        Case(
            rotate_and_write,
            f"{rows}x{own.num_heads}/{own.num_kv_heads}x{dim}",
            partial(make, rows),
            TOLERANCE[work.dtype],
            work.dtype.itemsize * rows * dim * (2 * written + 2),
            3 * rows * dim * (own.num_heads + own.num_kv_heads),
            written=(4,),
        )
        for rows in work.rows
    ]


def _paged_attention(work: Workload) -> list[Case]:
    """A step of decodes for each number of rows, and one whole chunk of a prompt."""
    own = work.model
    heads = f"{own.num_heads}/{own.num_kv_heads}x{own.head_dim}"

    def make(query_lens: tuple[int, ...], context_lens: tuple[int, ...], generator: torch.Generator) -> tuple[Any, ...]:
        step, num_blocks = _step(list(query_lens), list(context_lens), generator.device)
        cache = _normal(generator, work.dtype, num_blocks, _BLOCK_SIZE, 2 * own.num_kv_heads, own.head_dim)
        return _normal(generator, work.dtype, sum(query_lens), own.num_heads, own.head_dim), cache, step, None

    def case(label: str, query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> Case:
        sizes = (own.num_heads, own.num_kv_heads, own.head_dim, _BLOCK_SIZE, 0)
        costs = AttentionCase(label, query_lens, context_lens, *sizes)
        return Case(
            paged_attention,
            f"{label} {heads}",
            partial(make, query_lens, context_lens),
            TOLERANCE[work.dtype],
            costs.num_bytes * work.dtype.itemsize // 4,
            costs.num_flops,
        )

    decodes = [case(f"decode {n}x{work.context}", (1,) * n, (work.context,) * n) for n in work.rows]
    return [*decodes, case(f"prefill {work.chunk}", (work.chunk,), (work.chunk,))]


@dataclass(frozen=True)
class _Matrix:
    """A way to hold a matrix [out, in]: `make(generator, dtype, out, in)` gives the op's arguments after x.

    `num_bytes(out, in, itemsize)` are what a product reads of them, `itemsize` being the activations'.
    """

    make: Callable[[torch.Generator, torch.dtype, int, int], tuple[Any, ...]]
    num_bytes: Callable[[int, int, int], int]
    label: Callable[[int], str] = lambda inner: ""
    products: tuple[str, ...] = ("qkv", "o", "gate_up", "down")
    tolerance: float = _QUANTIZED
    has_float_peak: bool = True


def _products(op: Op[Any, torch.Tensor], matrices: tuple[_Matrix, ...], work: Workload) -> list[Case]:
    """x [rows, in] times each matrix at each of its products. A gated product gives half of the matrix's outputs."""
    shapes = work.products()

    def make(matrix: _Matrix, rows: int, out: int, inner: int, generator: torch.Generator) -> tuple[Any, ...]:
        x = _normal(generator, work.dtype, rows, inner)
        return x, *matrix.make(generator, work.dtype, out, inner)

    made = []
    for matrix in matrices:
        tolerance = max(TOLERANCE[work.dtype], matrix.tolerance)
        for product in matrix.products:
            out, inner = shapes[product]
            results = out // 2 if op is gated_linear else out
            for rows in work.rows:
                made.append(
                    Case(
                        op,
                        f"{product} {rows}x{inner}x{out}{matrix.label(inner)}",
                        partial(make, matrix, rows, out, inner),
                        tolerance,
                        matrix.num_bytes(out, inner, work.dtype.itemsize)
                        + work.dtype.itemsize * rows * (inner + results),
                        2 * rows * out * inner,
                        has_float_peak=matrix.has_float_peak,
                    )
                )
    return made


def _dense(generator: torch.Generator, dtype: torch.dtype, out: int, inner: int) -> tuple[Any, ...]:
    return (_normal(generator, dtype, out, inner).mul_(inner**-0.5),)


def _int8(generator: torch.Generator, dtype: torch.dtype, out: int, inner: int) -> tuple[Any, ...]:
    device = generator.device
    values = torch.randint(-128, 128, (out, inner), dtype=torch.int8, generator=generator, device=device)
    return values, torch.rand(out, generator=generator, device=device) * 0.01 + 0.001


def _int4_group(inner: int) -> int:
    return next((group for group in (128, 64, 32) if inner % group == 0), inner)


def _int4(generator: torch.Generator, dtype: torch.dtype, out: int, inner: int) -> tuple[Any, ...]:
    device, group = generator.device, _int4_group(inner)
    unsigned = torch.randint(0, 16, (out, inner), dtype=torch.uint8, generator=generator, device=device)
    packed = torch.empty(0, dtype=torch.uint8)
    if device.type == "cpu" and group != inner and out % 16 == 0:
        packed = torch._convert_weight_to_int4pack_for_cpu(unsigned.to(torch.int32), 1)
    scale = torch.rand(inner // group, out, 2, generator=generator, device=device) * 0.01
    return packed, unsigned[:, 0::2] | (unsigned[:, 1::2] << 4), scale.to(torch.bfloat16), group


def _int4_blocks(generator: torch.Generator, dtype: torch.dtype, out: int, inner: int) -> tuple[Any, ...]:
    device, group = generator.device, _int4_group(inner)
    unsigned = torch.randint(0, 16, (out, inner), dtype=torch.uint8, generator=generator, device=device)
    values = pack_int4_blocks(unsigned, group)
    assert values is not None
    scale = torch.rand(inner // group, out, generator=generator, device=device) * 0.01 + 0.001
    return Int4Blocks(values, scale.to(torch.float16), None), False


def _float8(
    in_blocks: bool, rounds_input: bool, generator: torch.Generator, dtype: torch.dtype, out: int, inner: int
) -> tuple[Any, ...]:
    values = _normal(generator, torch.float32, out, inner).to(torch.float8_e4m3fn)
    shape = (-(-out // FLOAT8_BLOCK), -(-inner // FLOAT8_BLOCK)) if in_blocks else (out,)
    return values, torch.rand(shape, generator=generator, device=generator.device) * 0.01 + 0.001, rounds_input, False


def _float8_bytes(in_blocks: bool, out: int, inner: int, itemsize: int) -> int:
    scales = -(-out // FLOAT8_BLOCK) * -(-inner // FLOAT8_BLOCK) if in_blocks else out
    return out * inner + 4 * scales


def _dense_bytes(out: int, inner: int, itemsize: int) -> int:
    return out * inner * itemsize


_DENSE = _Matrix(_dense, _dense_bytes, products=("qkv", "o", "gate_up", "down", "head"), tolerance=0.0)
_GATED = _Matrix(_dense, _dense_bytes, products=("gate_up",), tolerance=0.0)
_INT8 = _Matrix(_int8, lambda out, inner, itemsize: out * inner + 4 * out)
_INT4 = _Matrix(
    _int4,
    lambda out, inner, itemsize: out * inner // 2 + 4 * out * (inner // _int4_group(inner)),
    label=lambda inner: f" g{_int4_group(inner)}",
)
_INT8_ROUNDED = _Matrix(
    _int8,
    lambda out, inner, itemsize: out * inner + 4 * out,
    lambda inner: " a8",
    has_float_peak=False,
    tolerance=_ROUNDED,
)
_INT4_BLOCKS = _Matrix(
    _int4_blocks,
    lambda out, inner, itemsize: out * inner // 2 + 2 * out * (inner // _int4_group(inner)),
    label=lambda inner: f" g{_int4_group(inner)}",
)
_FLOAT8 = (
    _Matrix(partial(_float8, False, False), partial(_float8_bytes, False)),
    _Matrix(
        partial(_float8, False, True),
        partial(_float8_bytes, False),
        lambda inner: " a8",
        has_float_peak=False,
        tolerance=_ROUNDED,
    ),
    _Matrix(
        partial(_float8, True, True),
        partial(_float8_bytes, True),
        lambda inner: f" b{FLOAT8_BLOCK} a8",
        has_float_peak=False,
        tolerance=_ROUNDED,
    ),
)

MODEL_CASES: dict[str, Callable[[Workload], list[Case]]] = {
    "rms_norm": partial(_norms, rms_norm),
    "add_rms_norm": partial(_norms, add_rms_norm),
    "silu_mul": _silu_mul,
    "rotate_and_write": _rotate_and_write,
    "paged_attention": _paged_attention,
    "dense_linear": partial(_products, dense_linear, (_DENSE,)),
    "gated_linear": partial(_products, gated_linear, (_GATED,)),
    "int8_linear": partial(_products, int8_linear, (_INT8,)),
    "int4_linear": partial(_products, int4_linear, (_INT4,)),
    "float8_linear": partial(_products, float8_linear, _FLOAT8),
    "int8_rounded_linear": partial(_products, int8_rounded_linear, (_INT8_ROUNDED,)),
    "int4_blocks_linear": partial(_products, int4_blocks_linear, (_INT4_BLOCKS,)),
}
"""By op, in the order they are shown; a new op is one entry."""
