"""Streams for the native kernels: what is packed comes back exactly, and each byte lies where the kernels look."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.gguf_blocks import dequantize
from powertrain.kernels import native as native_kernels
from powertrain.model.packed import (
    Grid,
    PackedLayout,
    PackedMatrix,
    Part,
    can_stack,
    gguf_part,
    int_part,
    pack,
    unpack,
)
from powertrain.model.weights import IntWeight

GGUF_TYPES = ["Q4_0", "Q4_1", "Q8_0"]
FLOAT_TYPES = [torch.float32, torch.float16, torch.bfloat16]

sizes = st.integers(1, 70)
blocks = st.integers(1, 5)
seeds = st.integers(0, 2**31)


def gguf_rows(type_name: str, out_features: int, in_features: int, seed: int) -> np.ndarray:
    weight = np.random.default_rng(seed).standard_normal((out_features, in_features), dtype=np.float32)
    return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[type_name])


def int_weight(
    shape: tuple[int, int], num_bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, seed: int
) -> IntWeight:
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2 ** (num_bits - 1)), 2 ** (num_bits - 1)
    groups = shape[1] // group_size
    zero = torch.randint(low, high, (shape[0], groups), dtype=torch.int8, generator=generator)
    return IntWeight(
        torch.randint(low, high, shape, dtype=torch.int8, generator=generator),
        (torch.rand(shape[0], groups, generator=generator) / 8 + 0.001).to(dtype),
        None if symmetric else zero,
        num_bits,
    )


@given(st.sampled_from(GGUF_TYPES), sizes, blocks, seeds)
@settings(deadline=None, max_examples=60)
def test_gguf_blocks_keep_every_weight_bit_for_bit(type_name: str, rows: int, num_blocks: int, seed: int) -> None:
    raw = gguf_rows(type_name, rows, num_blocks * 32, seed)
    stream, layout = pack([gguf_part(type_name, raw)])
    assert torch.equal(unpack(stream, layout), dequantize(type_name, raw))
    assert layout.name == type_name.lower()
    assert layout.quantizes_activations
    assert layout.group_blocks == 1


@given(st.sampled_from(FLOAT_TYPES), sizes, sizes, seeds)
@settings(deadline=None, max_examples=60)
def test_floats_keep_their_type_and_values(dtype: torch.dtype, rows: int, cols: int, seed: int) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)
    stream, layout = pack([weight])
    assert torch.equal(unpack(stream, layout), weight.float())
    assert layout.name == str(dtype).removeprefix("torch.")
    assert stream.numel() == -(-rows // 16) * 16 * cols * dtype.itemsize


@given(
    st.integers(2, 8),
    st.sampled_from(["channel", 32, 64, 96]),
    st.booleans(),
    st.sampled_from(FLOAT_TYPES),
    sizes,
    st.integers(1, 4),
    seeds,
)
@settings(deadline=None, max_examples=120)
def test_integers_mean_what_their_checkpoint_means(
    num_bits: int, group: int | str, symmetric: bool, dtype: torch.dtype, rows: int, count: int, seed: int
) -> None:
    cols = count * 37 if isinstance(group, str) else count * group
    group_size = cols if isinstance(group, str) else group
    weight = int_weight((rows, cols), num_bits, group_size, symmetric, dtype, seed)
    stream, layout = pack([int_part(weight)])
    unpacked, expected = unpack(stream, layout), weight.dequantize()
    if symmetric or dtype != torch.float32:
        assert torch.equal(unpacked, expected)
    else:  # code * scale + minimum rounds twice where (code - zero) * scale rounds once
        assert (unpacked - expected).abs().max() <= 2**-23 * 256 * weight.scale.max()
    assert layout.kind == ("u4" if num_bits <= 4 else "s8")
    assert layout.has_minimum == (not symmetric)
    assert not layout.quantizes_activations


def test_widths_of_the_same_codes_are_one_stream() -> None:
    parts = [int_part(int_weight((16, 64), bits, 32, True, torch.float16, bits)) for bits in (2, 3, 4)]
    assert can_stack(parts)
    assert not can_stack([*parts, int_part(int_weight((16, 64), 5, 32, True, torch.float16, 0))])


def test_scales_take_two_bytes_only_where_nothing_is_lost() -> None:
    def scale_type(dtype: torch.dtype, factor: float = 1.0) -> str:
        weight = int_weight((16, 64), 4, 64, True, dtype, 0)
        return pack([int_part(weight._replace(scale=weight.scale * factor))])[1].scale

    assert scale_type(torch.float16) == "f16"
    assert scale_type(torch.bfloat16) == "f16"
    assert scale_type(torch.bfloat16, 2.0**-30) == "f32"
    assert scale_type(torch.bfloat16, 2.0**20) == "f32"
    assert scale_type(torch.float32) == "f32"


def test_a_group_that_is_no_whole_number_of_blocks_becomes_float32() -> None:
    weight = int_weight((20, 96), 4, 48, False, torch.float32, 3)
    stream, layout = pack([int_part(weight)])
    assert layout.name == "float32"
    assert torch.equal(unpack(stream, layout), weight.dequantize())


def some_parts(kind: str, rows: list[int], num_blocks: int, seed: int) -> list[Part]:
    cols = 32 * num_blocks
    if kind in GGUF_TYPES:
        return [gguf_part(kind, gguf_rows(kind, n, cols, seed + n)) for n in rows]
    if kind == "float":
        return [torch.randn(n, cols, generator=torch.Generator().manual_seed(seed + n)) for n in rows]
    dtype = torch.float16 if kind == "int" else torch.float32
    return [int_part(int_weight((n, cols), 4, 32, kind == "int", dtype, seed + n)) for n in rows]


stackable = st.sampled_from(["Q4_0", "Q4_1", "Q8_0", "float", "int", "asymmetric int"])


@given(stackable, st.lists(sizes, min_size=2, max_size=3), blocks, seeds)
@settings(deadline=None, max_examples=60)
def test_stacked_matrices_stand_below_one_another(kind: str, rows: list[int], num_blocks: int, seed: int) -> None:
    parts = some_parts(kind, rows, num_blocks, seed)
    expected = torch.cat([unpack(*pack([part])) for part in parts])
    stream, layout = pack(parts)
    assert layout.out_features == sum(rows)
    assert torch.equal(unpack(stream, layout), expected)


@given(stackable, sizes, blocks, seeds)
@settings(deadline=None, max_examples=60)
def test_gate_and_up_take_turns_panel_by_panel(kind: str, rows: int, num_blocks: int, seed: int) -> None:
    gate, up = some_parts(kind, [rows], num_blocks, seed) + some_parts(kind, [rows], num_blocks, seed + 1)
    alone = [pack([part]) for part in (gate, up)]
    stream, layout = pack([gate, up], is_gate_up=True)
    assert torch.equal(unpack(stream, layout), torch.cat([unpack(*one) for one in alone]))
    panels = stream.view(-1, layout.panel_bytes)
    assert torch.equal(panels[0::2].flatten(), alone[0][0])
    assert torch.equal(panels[1::2].flatten(), alone[1][0])
    assert layout.out_features == 2 * rows
    assert layout.num_bytes == stream.numel()


def test_float_scales_of_one_part_make_all_of_the_stream_float() -> None:
    half, single = (int_part(int_weight((24, 64), 4, 32, False, dtype, 5)) for dtype in (torch.float16, torch.float32))
    symmetric = int_part(int_weight((24, 64), 4, 32, True, torch.float16, 5))
    assert isinstance(symmetric, Grid)
    assert not can_stack([half, symmetric])
    for is_gate_up in (False, True):
        stream, layout = pack([half, single], is_gate_up)
        assert layout.scale == "f32"
        assert torch.equal(unpack(stream, layout), torch.cat([unpack(*pack([p])) for p in (half, single)]))
    with pytest.raises(ValueError, match="different grids"):
        pack([half, symmetric])


def test_four_bit_codes_lie_where_the_kernels_look() -> None:
    weight = int_weight((32, 128), 4, 64, False, torch.float32, 7)
    stream, layout = pack([int_part(weight)])
    header, group_bytes = 2 * 16 * 4, 2 * 16 * 4 + 2 * 256
    assert layout.panel_bytes == 2 * group_bytes
    for out, column in [(0, 0), (5, 17), (15, 63), (16, 64), (31, 127), (20, 95)]:
        group, block, inner = column // 64, column % 64 // 32, column % 32
        start = out // 16 * layout.panel_bytes + group * group_bytes
        j, i = inner % 16 // 4, inner % 4
        byte = int(stream[start + header + block * 256 + (j * 16 + out % 16) * 4 + i])
        assert (byte >> 4 if inner >= 16 else byte & 15) == int(weight.values[out, column]) + 8
        scale = stream[start : start + header].view(torch.float32)[out % 16]
        assert float(scale) == float(weight.scale[out, group])


def test_eight_bit_codes_lie_where_the_kernels_look() -> None:
    raw = gguf_rows("Q8_0", 20, 64, 1)
    stream, layout = pack([gguf_part("Q8_0", raw)])
    for out, column in [(0, 0), (15, 31), (16, 32), (19, 63), (3, 22)]:
        start = out // 16 * layout.panel_bytes + column // 32 * (32 + 512)
        j, i = column % 32 // 4, column % 4
        assert stream[start + 32 + (j * 16 + out % 16) * 4 + i] == raw[out, column // 32 * 34 + 2 + column % 32]
        assert stream[start + out % 16 * 2] == raw[out, column // 32 * 34]
    assert not stream[layout.panel_bytes :].view(2, -1)[0, 2 * 4 : 32].any()  # outputs 20 to 31 have no scale


def test_floats_lie_where_the_kernels_look() -> None:
    weight = torch.randn(18, 5)
    stream, _ = pack([weight])
    elements = stream.view(torch.float32).view(2, 5, 16)
    assert torch.equal(elements[0].t(), weight[:16])
    assert torch.equal(elements[1, :, :2].t(), weight[16:])
    assert not elements[1, :, 2:].any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "u5"},
        {"out_features": 0},
        {"in_features": 2**40},
        {"group_blocks": 0},
        {"group_blocks": 3},
        {"scale": "f64"},
        {"out_features": True},
        {"out_features": 15, "is_gate_up": True},
        {"kind": "f32"},
    ],
)
def test_layouts_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"kind": "u4", "out_features": 16, "in_features": 128, "group_blocks": 2}
    PackedLayout(**right)
    with pytest.raises(ValueError, match=r"."):
        PackedLayout(**{**right, **wrong})


def test_a_layout_names_its_format() -> None:
    def name(*, quantizes: bool = False, group_size: int = 64, num_bits: int = 4) -> str:
        weight = int_weight((16, 192), num_bits, group_size, True, torch.float32, 0)
        return pack([int_part(weight, quantizes)])[1].name

    assert name() == "int4 g64"
    assert name(quantizes=True) == "int4 g64 a8"
    assert name(group_size=192) == "int4"
    assert name(num_bits=8, group_size=192) == "int8"
    assert name(num_bits=8, group_size=192, quantizes=True) == "int8 a8"


def test_a_packed_matrix_multiplies_through_the_native_module_in_its_callers_dtype() -> None:
    part = gguf_part("Q4_1", gguf_rows("Q4_1", 24, 64, 0))
    stream, layout = pack([part])
    calls: list[tuple[Any, ...]] = []

    def native_matmul(team: str, matrix: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        calls.append((team, matrix["kind"], x.dtype, x.is_contiguous()))
        out.copy_(x @ unpack(stream, layout).t())

    def native_matrix(stream: torch.Tensor, kind: str, out_features: int, in_features: int, **rest: Any) -> Any:
        return {"kind": kind, "out": out_features, "in": in_features, **rest}

    native: Any = SimpleNamespace(Matrix=native_matrix, matmul=native_matmul)
    matrix = PackedMatrix(stream, layout, native, "team")
    x = torch.randn(64, 3).to(torch.bfloat16).t()
    assert torch.equal(matrix.matmul(x), (x.float() @ matrix.unpack().t()).to(torch.bfloat16))
    assert calls == [("team", "u4", torch.float32, True)]
    assert matrix.matrix["has_minimum"]
    assert matrix.nbytes() == matrix.step_bytes() == stream.numel() == 2 * 2 * (64 + 256)
    with pytest.raises(ValueError, match="bytes is expected"):
        PackedMatrix(stream[1:], layout, native, "team")


@pytest.mark.skipif(native_kernels.load() is None, reason=f"no native module: {native_kernels.unavailable()}")
@given(st.sampled_from(["float", "int", "asymmetric int"]), sizes, st.integers(1, 130), st.booleans(), seeds)
@settings(deadline=None, max_examples=60)
def test_the_native_product_is_that_of_the_unpacked_matrix(
    kind: str, rows: int, cols: int, is_gate_up: bool, seed: int
) -> None:
    native: Any = native_kernels.load()
    generator = torch.Generator().manual_seed(seed)
    parts: list[Part] = [torch.randn(rows, cols, generator=generator) for _ in range(2)]
    if kind != "float":
        weights = [
            int_weight((rows, cols), 4 + 4 * (seed % 2), cols, kind == "int", torch.float32, seed + n) for n in (0, 1)
        ]
        parts = [int_part(weight) for weight in weights]
    matrix = PackedMatrix(*pack(parts, is_gate_up), native, native.Team(1))
    x = torch.randn(1 + seed % 5, cols, generator=generator)
    expected = x.double() @ matrix.unpack().double().t()
    bound = x.abs().double() @ matrix.unpack().abs().double().t() * 2.0**-17
    assert bool(((matrix.matmul(x) - expected).abs() <= bound).all())
