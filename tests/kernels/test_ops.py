"""Each op's providers against its reference over the cases table; attention against arithmetic written out."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from powertrain.kernels.attention import AttentionStep, paged_attention, rotate_and_write, write_kv
from powertrain.kernels.cases import cases
from powertrain.kernels.op import Op, Provider, choosing, recorded_choices
from powertrain.model.weights import Dense, Int4Group, Int8Channel, IntWeight, concat_int_weights, pack_int_weight
from powertrain.types import ModelFileError

WITH_PROVIDERS = [case for case in cases() if case.op.providers]


@pytest.mark.parametrize("case", WITH_PROVIDERS, ids=lambda case: f"{case.op.name} {case.label}")
def test_providers_equal_their_reference(case):
    args = case.make(torch.Generator().manual_seed(5))
    expected = case.op.reference(*args)
    ran = 0
    for provider in case.op.providers:
        if provider.accepts(*args) is None:
            ran += 1
            error = (provider.run(*args) - expected).norm() / expected.norm()
            assert error < case.tolerance
    chosen = case.op.explain(*args)
    assert ("reference" in chosen) == (ran == 0)
    assert any(why in chosen for why in ("dequantizing", "whole vectors", "not on a CUDA device")) == (ran == 0)


def test_explain_names_what_runs_and_why_not_the_others():
    never = Provider("gpu", lambda x: x, lambda x: None, supported=lambda: "no GPU here")
    small = Provider("small", lambda x: x + 1, lambda x: None if x < 3 else f"{x} is too large")
    op = Op("bump", lambda x: x + 1, (never, small))
    assert (op(1), op(5)) == (2, 6)
    assert op.choose(5) == ("reference", ["gpu: no GPU here", "small: 5 is too large"])
    assert op.explain(1) == "bump: small (not gpu: no GPU here)"
    assert op.explain(5) == "bump: reference (not gpu: no GPU here; small: 5 is too large)"


def naive_attention(query, keys, values, window):
    """query [t, h, d] are the last t of the n positions of keys, values [n, kv, d]."""
    tokens, heads, dim = query.shape
    context, kv_heads = keys.shape[:2]
    out = torch.zeros_like(query)
    for t in range(tokens):
        own = context - tokens + t
        low = 0 if window is None else max(0, own - window + 1)
        for h in range(heads):
            g = h * kv_heads // heads
            scores = (keys[low : own + 1, g].double() @ query[t, h].double()) / math.sqrt(dim)
            out[t, h] = (scores.softmax(0) @ values[low : own + 1, g].double()).float()
    return out


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_paged_attention_equals_arithmetic_written_out(window, heads, kv_heads):
    """Two decodes of different length, a fresh prompt and a later chunk, in scattered blocks, in one step."""
    torch.manual_seed(0)
    dim, block_size, num_blocks = 16, 4, 40
    contexts, counts = [9, 1, 7, 14], [1, 1, 7, 6]
    order = torch.randperm(num_blocks)
    cache = torch.full((num_blocks, block_size, 2 * kv_heads, dim), 9.0)
    tables, keys, values = torch.zeros(4, 4, dtype=torch.long), [], []
    slots, positions = [], []
    for at, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        tables[at] = order[at * 4 : at * 4 + 4]
        keys.append(torch.randn(context, kv_heads, dim))
        values.append(torch.randn(context, kv_heads, dim))
        for position in range(context):
            block, offset = tables[at, position // block_size], position % block_size
            if position < context - count:
                cache[block, offset] = torch.cat((keys[at][position], values[at][position]))
            else:
                slots.append(int(block) * block_size + offset)
                positions.append(position)
    step = AttentionStep(counts, contexts, tables.numpy(), block_size, torch.device("cpu"))
    assert (step.positions.tolist(), step.slots.tolist(), step.num_decodes) == (positions, slots, 2)
    new = [slice(context - count, context) for context, count in zip(contexts, counts, strict=True)]
    pairs = [torch.cat((k[s], v[s]), dim=1) for k, v, s in zip(keys, values, new, strict=True)]
    write_kv(torch.cat(pairs), cache, step)
    query = torch.randn(sum(counts), heads, dim)
    out = paged_attention(query, cache, step, window)
    expected = [naive_attention(q, k, v, window) for q, k, v in zip(query.split(counts), keys, values, strict=True)]
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-5)


def int_weight(bits, groups, symmetric, out=48, inner=192):
    torch.manual_seed(bits + groups)
    half = 2 ** (bits - 1)
    values = torch.randint(-half, half, (out, inner), dtype=torch.int8)
    zero = None if symmetric else torch.randint(-half, half, (out, groups), dtype=torch.int8)
    return IntWeight(values, torch.rand(out, groups) * 0.01 + 0.001, zero, bits)


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "groups"), [(8, 1), (8, 3), (4, 3), (4, 6), (4, 1), (4, 2), (2, 3), (3, 6), (5, 1), (6, 3), (7, 1)]
)
def test_formats_multiply_as_their_dequantized_matrix(bits, groups, symmetric, rows):
    weight = int_weight(bits, groups, symmetric)
    fmt = pack_int_weight(weight, torch.device("cpu"))
    dense = weight.dequantize()
    # int4 keeps scales in bfloat16, as torch's kernel reads them
    assert (fmt.unpack() - dense).norm() / dense.norm() < (1e-6 if bits > 4 else 4e-3)
    x = torch.randn(rows, 192)
    expected = x @ dense.t()
    assert (fmt.matmul(x) - expected).norm() / expected.norm() < 8e-3
    assert fmt.matmul(x).dtype == torch.float32
    assert fmt.step_bytes() <= fmt.nbytes()


def test_concatenated_formats_equal_their_parts():
    parts = [int_weight(4, 3, False), int_weight(4, 3, False, out=16)]
    whole = pack_int_weight(concat_int_weights(parts), torch.device("cpu"))
    torch.testing.assert_close(whole.unpack()[48:], Int4Group.pack(parts[1], torch.device("cpu")).unpack())


def test_a_format_that_would_only_dequantize_is_refused():
    with pytest.raises(ModelFileError, match="4 bits, 3 groups a row"):
        pack_int_weight(int_weight(4, 3, True, inner=39), torch.device("cpu"))


def test_a_refusal_names_the_bits_of_the_file():
    with pytest.raises(ModelFileError, match="3 bits, 3 groups a row, asymmetric"):
        pack_int_weight(int_weight(3, 3, False, inner=39), torch.device("cpu"))


@pytest.mark.parametrize(("bits", "runs_as"), [(2, 4), (3, 4), (5, 8), (6, 8), (7, 8)])
def test_other_widths_take_the_bytes_of_the_width_they_run_as(bits, runs_as):
    narrow, wide = (pack_int_weight(int_weight(b, 3, False), torch.device("cpu")) for b in (bits, runs_as))
    assert (narrow.step_bytes(), narrow.nbytes(), narrow.name) == (wide.step_bytes(), wide.nbytes(), wide.name)


def test_nbytes_is_what_is_held():
    weight = int_weight(8, 1, True)
    assert Int8Channel.pack(weight, torch.device("cpu")).nbytes() == 48 * 192 + 48 * 4
    assert pack_int_weight(int_weight(8, 3, False), torch.device("cpu")).nbytes() == 48 * 192 + 48 * 3 * 5
    assert Dense(torch.zeros(48, 192)).nbytes() == 48 * 192 * 4
    assert Int4Group.pack(int_weight(4, 3, True), torch.device("cpu")).step_bytes() == 48 * 96 + 48 * 3 * 4


def small_op():
    small = Provider("small", lambda x: x + 1, lambda x: None if len(x) < 3 else f"{len(x)} rows are too many")
    return Op("bump", lambda x: x + 1, (small,))


def test_a_recorder_notes_each_provider_once_with_its_first_shapes_and_every_reason():
    bump = small_op()
    with recorded_choices() as choices:
        for rows in (2, 1, 3, 4, 4):
            bump(torch.zeros(rows, 5))
    assert list(choices) == [("bump", "small"), ("bump", "reference")]
    small, reference = choices.values()
    assert (small.shapes, small.refusals, small.num_calls) == (["2x5 float32"], [], 2)
    assert (reference.shapes, reference.num_calls) == (["3x5 float32"], 3)
    assert reference.refusals == ["small: 3 rows are too many", "small: 4 rows are too many"]
    assert str(small) == "bump: small"
    assert str(reference).startswith("bump: reference (not small: 3 rows")


def test_a_recorder_sees_tensors_in_tuples_and_what_a_reference_calls():
    step = AttentionStep.of_one(0, 2, 4, torch.device("cpu"))
    rope = (torch.ones(2, 1, 8), torch.zeros(2, 1, 8))
    with recorded_choices() as choices:
        rotate_and_write(torch.randn(2, 4, 8), rope, None, 0.0, torch.zeros(1, 4, 2, 8), step)
    assert {op for op, _ in choices} == {"rotate_and_write", "apply_rope", "write_kv"}
    shapes = choices["rotate_and_write", "reference"].shapes
    assert shapes == [f"{shape} float32" for shape in ("2x4x8", "2x1x8", "2x1x8", "1x4x2x8")]


def test_recorders_nest_end_with_their_block_and_are_off_by_default():
    bump, x = small_op(), torch.zeros(1)
    bump(x)
    with recorded_choices() as outer:
        bump(x)
        with recorded_choices() as inner, choosing("reference"):
            bump(x)
        with pytest.raises(TypeError), recorded_choices():
            bump(None)
        bump(x)
    bump(x)
    assert outer["bump", "small"].num_calls == 2
    assert list(outer) == [("bump", "small")]
    assert inner["bump", "reference"].refusals == ["small: the reference was asked for"]


def test_a_recorder_is_its_threads_own():
    bump = small_op()
    with recorded_choices() as choices, ThreadPoolExecutor(1) as threads:
        threads.submit(bump, torch.zeros(1)).result()
    assert choices == {}
