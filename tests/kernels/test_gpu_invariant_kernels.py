"""Batch-invariant kernels: a row's bits alone and among others; on a CPU under Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from powertrain.kernels.attention import AttentionStep, paged_attention
from powertrain.kernels.gpu import invariant
from powertrain.kernels.matmul import dense_linear
from powertrain.kernels.op import choosing
from powertrain.kernels.quantized import dequantize_float8, dequantize_int4_blocks
from powertrain.model.gpu_weights import Int4Blocked
from powertrain.model.weights import IntWeight

HAS_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter's own
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16
ROWS = (1, 16, 17, 64, 65, invariant.ROWS, invariant.ROWS + 5, 300) if HAS_GPU else (1, 17, invariant.ROWS + 5)
SHAPE = (320, 4096) if HAS_GPU else (70, 2048)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def products():
    out, inner = SHAPE
    dense = normal(out, inner, dtype=DTYPE, seed=1)
    float8, scale = dense.to(torch.float8_e4m3fn), torch.rand(out).to(DEVICE)
    of_blocks = torch.rand(-(-out // 128), inner // 128).to(DEVICE)
    ints = torch.randint(-8, 8, (out, inner), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    packed = Int4Blocked.pack(IntWeight(ints, torch.rand(out, inner // 128), None, 4), DEVICE)
    assert packed is not None
    blocks = packed._blocks
    int8 = (normal(out, inner, seed=3) * 40).clamp(-128, 127).to(torch.int8)
    return {
        "dense": (lambda x: invariant.dense_linear(x, dense), dense.float()),
        "fp8": (lambda x: invariant.float8_linear(x, float8, scale, True, False), dequantize_float8(float8, scale)),
        "fp8 blocks": (
            lambda x: invariant.float8_linear(x, float8, of_blocks, True, False),
            dequantize_float8(float8, of_blocks),
        ),
        "int8": (lambda x: invariant.int8_rounded_linear(x, int8, scale), int8.float() * scale[:, None]),
        "int4": (lambda x: invariant.int4_linear(x, blocks, False), dequantize_int4_blocks(blocks, torch.float32)),
    }


@pytest.mark.parametrize("kind", ["dense", "fp8", "fp8 blocks", "int8", "int4"])
def test_a_rows_product_does_not_depend_on_its_batch(kind):
    multiply, weight = products()[kind]
    x = normal(max(ROWS), SHAPE[1], dtype=DTYPE, seed=4)
    whole = multiply(x)
    expected = x.double() @ weight.double().t()
    assert (whole.double() - expected).norm() / expected.norm() < (1.2e-2 if HAS_GPU else 2e-3)
    for count in ROWS:
        first = x.shape[0] - count
        if HAS_GPU:
            assert torch.equal(multiply(x[first:]), whole[first:]), f"{count} rows"
        else:  # the interpreter multiplies tiles by numpy, which sums in an order of its own
            torch.testing.assert_close(multiply(x[first:]), whole[first:], rtol=2e-3, atol=2e-2)


def attend(query, cache, tables, query_lens, context_lens, window):
    step = AttentionStep(query_lens, context_lens, tables, 16, DEVICE)
    return invariant.paged_attention(query, cache, step, window)


@pytest.mark.parametrize("window", [None, 40])
def test_a_tokens_attention_depends_on_its_own_context_alone(window, monkeypatch):
    if not HAS_GPU:
        monkeypatch.setattr(invariant, "PIECE", 64)
    contexts = [530, 40, 300] if HAS_GPU else [150, 40, 70]
    width = -(-max(contexts) // 16)
    tables = np.random.default_rng(0).permutation(len(contexts) * width).reshape(-1, width)
    cache, query = normal(tables.size, 16, 4, 64, dtype=DTYPE), normal(3, 12, 6, 64, dtype=DTYPE, seed=1)
    # all decodes of the last token; then a whole chunk of each; then chunks and decodes mixed
    last = attend(query[:, -1].contiguous(), cache, tables, [1] * 3, contexts, window)
    for at in range(3):
        row = slice(at, at + 1)
        alone = attend(query[row, -1].contiguous(), cache, tables[row], [1], contexts[row], window)
        assert torch.equal(alone[0], last[at])
        chunk = attend(query[at], cache, tables[row], [12], contexts[row], window)
        assert torch.equal(chunk[-1], last[at])
    order = [1, 0, 2]
    mixed = torch.cat((query[1, -1:], query[0], query[2]))
    out = attend(mixed, cache, tables[order], [1, 12, 12], [contexts[at] for at in order], window)
    assert torch.equal(out[0], last[1])
    assert torch.equal(out[12], last[0])
    assert torch.equal(out[24], last[2])
    step = AttentionStep([1, 12, 12], [contexts[at] for at in order], tables[order], 16, DEVICE)
    expected = paged_attention.reference(mixed.float(), cache.float(), step, window)
    assert (out.float() - expected).norm() / expected.norm() < (1.2e-2 if HAS_GPU else 2e-3)


def test_long_contexts_are_taken_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(invariant, "MAX_PIECES", 4)
    contexts = [600, 200, 20, 580]
    tables = np.arange(4 * 38).reshape(4, 38)
    cache, query = normal(tables.size, 16, 2, 32, dtype=DTYPE), normal(4, 2, 32, dtype=DTYPE, seed=1)
    out = attend(query, cache, tables, [1] * 4, contexts, None)
    monkeypatch.undo()
    assert torch.equal(out, attend(query, cache, tables, [1] * 4, contexts, None))


def test_the_choice_is_among_providers_that_are_invariant():
    assert [provider.modes for provider in dense_linear.providers] == [("fast",), ("invariant",)]
    x, weight = torch.ones(1, 4), torch.ones(4, 4)
    with choosing("invariant"):
        assert dense_linear.explain(x, weight).startswith("dense_linear: reference (not triton")
    with choosing("reference"):
        assert "the reference was asked for" in dense_linear.explain(x, weight)
