"""The Triton kernels against the references: on a GPU where there is one, else under Triton's interpreter, slowly.

The interpreter computes bfloat16 wrongly, so that type is for a GPU alone.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from powertrain.engine.gpu_runner import count_tokens
from powertrain.engine.sampler import Row, _draw, sample, uniform
from powertrain.kernels.attention import AttentionStep, ScaledCache, paged_attention, rotate_and_write
from powertrain.kernels.fused import add_rms_norm, rms_norm, silu_mul
from powertrain.kernels.gpu import attention as gpu_attention
from powertrain.kernels.gpu import decode_attention as gpu_decode
from powertrain.kernels.gpu import fused as gpu_fused
from powertrain.kernels.gpu import inputs as gpu_inputs
from powertrain.kernels.gpu import matmul as gpu_matmul
from powertrain.kernels.gpu import sampling as gpu_sampling
from powertrain.kernels.gpu import whole_prompts
from powertrain.types import SamplingParams

HAS_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array")  # of the interpreter's own
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def difference(out, expected):
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@each_dtype
@pytest.mark.parametrize(("rows", "width"), [(1, 576), (3, 37), (2, 4096)])
def test_norms_and_gated_activation(rows, width, dtype):
    x, delta, weight = (
        normal(rows, width, dtype=dtype),
        normal(rows, width, dtype=dtype, seed=1),
        normal(width).to(dtype),
    )
    assert difference(gpu_fused.rms_norm(x, weight, 1e-5), rms_norm.reference(x, weight, 1e-5)) < TOLERANCE[dtype]
    own, expected = x.clone(), x.clone()
    normed = gpu_fused.add_rms_norm(own, delta, weight, 1e-5)
    assert difference(normed, add_rms_norm.reference(expected, delta, weight, 1e-5)) < TOLERANCE[dtype]
    assert torch.equal(own, expected)
    gate_up = normal(rows, 2 * width, dtype=dtype)
    assert difference(gpu_fused.silu_mul(gate_up), silu_mul.reference(gate_up)) < TOLERANCE[dtype]


@each_dtype
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_norm_sums_the_pieces_of_a_product(pieces, dtype):
    x, weight = normal(4, 300, dtype=dtype), normal(300).to(dtype)
    delta = normal(pieces, 4, 300, seed=1)
    own, expected = x.clone(), x.clone()
    normed = gpu_fused.add_rms_norm(own, delta, weight, 1e-5)
    assert difference(normed, add_rms_norm.reference(expected, delta, weight, 1e-5)) < TOLERANCE[dtype]
    assert difference(own, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("splits", [1, 4])
def test_a_product_left_in_pieces_is_its_sum(splits):
    x, weight = normal(3, 512), normal(40, 512, seed=1)
    config = gpu_matmul.SkinnyConfig(16, 64, splits, 4, 2)
    pieces = gpu_matmul.skinny_linear(x, weight, config, keeps_pieces=True)
    assert pieces.shape == ((splits, 3, 40) if splits > 1 else (3, 40))
    whole = gpu_matmul.skinny_linear(x, weight, config)
    assert difference(pieces.sum(0) if splits > 1 else pieces, whole) < 1e-6


def step_over(query_lens, context_lens, block_size=16, seed=0):
    """A step whose blocks lie in a random order, and the number of blocks."""
    width = -(-max(context_lens) // block_size)
    num_blocks = len(query_lens) * width
    tables = np.random.default_rng(seed).permutation(num_blocks).reshape(-1, width)
    return AttentionStep(list(query_lens), list(context_lens), tables, block_size, DEVICE), num_blocks


@each_dtype
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("is_by_head", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 80), (2, 2, 10)])
def test_rotation_and_cache_write(heads, kv_heads, dim, is_by_head, has_norms, dtype):
    step, num_blocks = step_over([1, 1, 5], [17, 3, 20])
    angles = normal(7, 1, dim // 2)
    rope = (
        torch.cat((angles.cos(), angles.cos()), -1).to(dtype),
        torch.cat((-angles.sin(), angles.sin()), -1).to(dtype),
    )
    norms = (normal(dim, dtype=dtype, seed=1), normal(dim, dtype=dtype, seed=2)) if has_norms else None
    qkv = normal(7, heads + 2 * kv_heads, dim, dtype=dtype, seed=3)
    caches = [torch.zeros(num_blocks, 16, 2 * kv_heads, dim, device=DEVICE, dtype=dtype) for _ in range(2)]
    if is_by_head:
        caches[0] = laid_by_head(caches[0])
    out = gpu_fused.rotate_and_write(qkv.clone(), rope, norms, 1e-5, caches[0], step)
    expected = rotate_and_write.reference(qkv.clone(), rope, norms, 1e-5, caches[1], step)
    assert difference(out, expected) < TOLERANCE[dtype]
    assert difference(caches[0], caches[1]) < TOLERANCE[dtype]
    # what a product has left in pieces gives the bits of their sum, rounded to the tables' type
    pieces = torch.stack([qkv.float() * share for share in (0.25, 0.5, 0.25)])
    whole = (pieces[0] + pieces[1] + pieces[2]).to(dtype)
    found = [
        gpu_fused.rotate_and_write(each.clone(), rope, norms, 1e-5, caches[0].zero_(), step) for each in (whole, pieces)
    ]
    assert torch.equal(*found)
    of_pieces = rotate_and_write.reference(pieces, rope, norms, 1e-5, caches[1].zero_(), step)
    assert difference(found[1], of_pieces) < TOLERANCE[dtype]
    assert difference(caches[0], caches[1]) < TOLERANCE[dtype]


def laid_by_head(cache):
    """The same layer's cache in the other layout."""
    if isinstance(cache, ScaledCache):
        return ScaledCache(laid_by_head(cache.values), laid_by_head(cache.scales))
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def quantized_cache(num_blocks, block_size, heads, dim, kind):
    values = torch.zeros(num_blocks, block_size, heads, dim, device=DEVICE).to(kind)
    return ScaledCache(values, torch.zeros(num_blocks, block_size, heads, device=DEVICE))


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("is_by_head", [False, True])
def test_8_bit_caches_hold_what_the_reference_writes(is_by_head, kind):
    step, num_blocks = step_over([1, 1, 5], [17, 3, 20])
    ones = torch.ones(7, 1, 80, device=DEVICE)
    # a query, two keys and two values, the last of zeros
    qkv = normal(7, 5, 80) * torch.tensor([1.0, 30.0, 0.01, 2.0, 0.0], device=DEVICE)[:, None]
    caches = [quantized_cache(num_blocks, 16, 4, 80, kind) for _ in range(2)]
    if is_by_head:
        caches = [laid_by_head(cache) for cache in caches]
    for write, cache in ((gpu_fused.rotate_and_write, caches[0]), (rotate_and_write.reference, caches[1])):
        write(qkv.clone(), (ones, 0 * ones), None, 1e-5, cache, step)
    own, expected = caches
    torch.testing.assert_close(own.scales, expected.scales, rtol=1e-6, atol=0)
    wrong = own.values.float() != expected.values.float()
    if kind == torch.float8_e4m3fn and not HAS_GPU:
        # the interpreter loses the carry where the mantissa rounds up to the next power of two
        wrong &= expected.values.float().abs().frexp().mantissa != 0.5
    assert wrong.float().mean() < 0.001  # a quotient on the border of two steps may fall to either side


@each_dtype
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 1, 80), (2, 2, 16)])
def test_paged_attention_over_8_bit_caches(heads, kv_heads, dim, window, kind, dtype):
    query_lens, context_lens = [1, 1, 5, 40], [64, 17, 5, 70]
    step, num_blocks = step_over(query_lens, context_lens)
    cache = quantized_cache(num_blocks, 16, 2 * kv_heads, dim, kind)
    raw = normal(*cache.values.shape) * (30 if kind == torch.int8 else 100)
    cache = ScaledCache(raw.to(kind), torch.rand(cache.scales.shape, device=DEVICE) * 0.03)
    query = normal(sum(query_lens), heads, dim, dtype=dtype, seed=1)
    out = gpu_attention.paged_attention(query, laid_by_head(cache), step, window)
    assert torch.equal(out, gpu_attention.paged_attention(query, cache, step, window))
    expected = paged_attention.reference(query.float(), cache, step_over(query_lens, context_lens)[0], window)
    assert difference(out, expected) < TOLERANCE[dtype]


def test_a_padded_row_writes_nothing_to_the_cache():
    table = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    lens = torch.tensor([1, 0], device=DEVICE)
    step = AttentionStep.of_decodes(lens * 0, lens, torch.tensor([3, -1], device=DEVICE), table, 16)
    cache = torch.zeros(1, 16, 2, 16, device=DEVICE)
    ones = torch.ones(2, 1, 16, device=DEVICE)
    gpu_fused.rotate_and_write(normal(2, 3, 16), (ones, 0 * ones), None, 1e-5, cache, step)
    assert cache[0, 3].abs().sum() > 0
    cache[0, 3] = 0.0
    assert not cache.any()


STEPS = [
    ((1,), (300,)),
    ((1, 1, 1, 1), (1, 16, 65, 129)),
    ((1, 1, 5, 40), (64, 17, 5, 70)),
    ((33,), (33,)),
]


@each_dtype
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("block_size", [16, 24])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (9, 3, 64), (4, 1, 80)])
@pytest.mark.parametrize(("query_lens", "context_lens"), STEPS)
def test_paged_attention(query_lens, context_lens, heads, kv_heads, dim, block_size, window, dtype):
    step, num_blocks = step_over(query_lens, context_lens, block_size)
    cache = normal(num_blocks, block_size, 2 * kv_heads, dim, dtype=dtype)
    # queries as they lie among keys and values
    query = normal(sum(query_lens), heads + 2 * kv_heads, dim, dtype=dtype, seed=1)[:, :heads]
    out = gpu_attention.paged_attention(query, laid_by_head(cache), step, window)
    exact = step_over(query_lens, context_lens, block_size)[0]
    expected = paged_attention.reference(query.float(), cache.float(), exact, window)
    assert difference(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", [None, torch.int8], ids=str)
def test_long_whole_prompts_are_the_librarys(kind, monkeypatch):
    """Among decodes, short prompts and chunks of longer ones, which are not."""
    monkeypatch.setattr(whole_prompts, "SHORTEST", 40)
    monkeypatch.setattr(whole_prompts, "LENGTH_STEP", 48)
    query_lens, context_lens = [1, 50, 5, 40, 96, 45], [30, 50, 5, 70, 96, 45]
    step, num_blocks = step_over(query_lens, context_lens)
    dtype = torch.bfloat16 if HAS_GPU else torch.float16
    cache = normal(num_blocks, 16, 4, 32, dtype=dtype)
    if kind is not None:
        cache = ScaledCache((cache * 30).to(kind), torch.full((num_blocks, 16, 4), 0.03, device=DEVICE))
    query = normal(sum(query_lens), 6, 32, dtype=dtype, seed=1)
    found = whole_prompts.whole_prompts(step, query, None)
    assert [tuple(prompt) for prompt in found] == [(1, 1, 50), (4, 96, 96), (5, 192, 45)]
    assert whole_prompts.whole_prompts(step, query, 30) == whole_prompts.whole_prompts(step, query.float(), None) == []
    out = gpu_attention.paged_attention(query, cache, step, None)
    wide = cache if kind is not None else cache.float()
    expected = paged_attention.reference(query.float(), wide, step_over(query_lens, context_lens)[0], None)
    assert difference(out, expected) < TOLERANCE[dtype]
    alone = gpu_attention.paged_attention(query[:96], laid_by_head(cache), step_over([96], [96])[0], None)
    expected = paged_attention.reference(query[:96].float(), wide, step_over([96], [96])[0], None)
    assert difference(alone, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("fixed", [0, 64])
def test_a_decode_with_pieces_of_fixed_length_does_not_depend_on_its_batch(fixed):
    lens = [200, 1, 64, 130]
    step, num_blocks = step_over([1] * 4, lens)
    cache, query = normal(num_blocks, 16, 2, 64), normal(4, 3, 64, seed=1)
    context_lens = torch.tensor(lens, device=DEVICE)

    def run(rows):
        split = gpu_decode.split_decodes(context_lens[rows], 208, 1, 4, fixed)
        out = torch.empty(len(rows), 3, 64, device=DEVICE)
        tables = step.block_tables[rows].contiguous()
        return gpu_decode.decode_attention(query[rows], cache, tables, context_lens[rows], split, None, out)

    together = run([0, 1, 2, 3])
    alone = torch.cat([run([row]) for row in range(4)])
    assert difference(together, alone) < 1e-6
    assert not fixed or torch.equal(together, alone)


@each_dtype
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 70, 256), (5, 64, 200), (33, 16, 512)])
def test_products_of_few_rows(rows, outputs, inputs, splits, dtype):
    x, weight = normal(rows, inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype, seed=1)
    out = gpu_matmul.skinny_linear(x, weight, gpu_matmul.SkinnyConfig(32, 128, splits, 4, 2))
    assert difference(out, x.double() @ weight.double().t()) < TOLERANCE[dtype]


def draws_of(rows):
    """As the engine hands them over: settings and the uniform number of each row."""

    def column(make, dtype=torch.float32):
        return torch.tensor([make(row) for row in rows], dtype=dtype, device=DEVICE)

    return gpu_sampling.Draws(
        temperature=column(lambda row: row.sampling.temperature),
        uniform=column(lambda row: uniform(row.seed, row.index, len(row.context))),
        top_p=column(lambda row: row.sampling.top_p),
        min_p=column(lambda row: row.sampling.min_p),
        top_k=column(lambda row: row.sampling.top_k, torch.int64),
        repetition=column(lambda row: row.sampling.repetition_penalty),
        presence=column(lambda row: row.sampling.presence_penalty),
        frequency=column(lambda row: row.sampling.frequency_penalty),
    )


def draw(logits, rows):
    """Each row's sequence counted in a slot of its own."""
    counts = torch.zeros(len(rows), logits.shape[1], dtype=torch.int16, device=DEVICE)
    for slot, row in enumerate(rows):
        count_tokens(counts[slot], row.context, row.num_prompt)
    return gpu_sampling.draw_tokens(
        logits, draws_of(rows), gpu_sampling.Seen(counts, torch.arange(len(rows), device=DEVICE))
    )


SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 40]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
)


@settings(max_examples=12 if not HAS_GPU else 200, deadline=None)
@example(sampling=[SamplingParams(temperature=1.0, top_p=0.9, min_p=0.05)], seed=0)  # min_p comes first
@given(sampling=st.lists(SETTINGS, min_size=1, max_size=3), seed=st.integers(0, 2**31))
def test_draws_are_those_of_the_reference(sampling, seed):
    """Up to rounding: a draw that lands on the border between two tokens may take either."""
    rows = [Row(one, [1, 2, 3], 3, (), seed + at, 0) for at, one in enumerate(sampling)]
    logits = normal(len(rows), 5000, seed=seed % 1000) * 3
    tokens = draw(logits, rows).tolist()
    expected = _draw(logits.cpu().clone(), rows)
    if tokens != expected:
        shifted = [Row(row.sampling, row.context, 3, (), row.seed, 0) for row in rows]
        near = {token for draw in (1e-6, -1e-6) for token in nudged(logits.cpu(), shifted, draw)}
        assert set(tokens) <= near | set(expected)


def nudged(logits, rows, by):
    """The reference's tokens for uniform numbers moved a little."""
    from powertrain.engine.sampler import _probabilities

    sums = _probabilities(logits.clone(), [row.sampling for row in rows]).double().cumsum(-1)
    numbers = [min(max(uniform(row.seed, row.index, len(row.context)) + by, 0.0), 1 - 1e-12) for row in rows]
    return torch.searchsorted(sums, torch.tensor(numbers).double()[:, None] * sums[:, -1:], right=True)[:, 0].tolist()


def test_greedy_takes_the_lowest_of_equals_and_names_rows_that_are_not_finite():
    logits = normal(4, 9000)
    logits[0, [77, 5000]] = 50.0
    logits[1, 8999] = 60.0
    logits[2, 4] = torch.nan
    logits[3, 4500] = -torch.inf
    rows = [Row(SamplingParams(temperature=0.0), [1], 1, (), 0, 0) for _ in range(4)]
    assert draw(logits, rows).tolist() == [77, 8999, -1, -1]


def test_equal_logits_at_the_edge_of_top_k_stay_in():
    logits = torch.full((12, 300), -5.0, device=DEVICE)
    logits[:, [3, 100, 200]] = 2.0
    rows = [Row(SamplingParams(temperature=1.0, top_k=2), [1], 1, (), seed, 0) for seed in range(12)]
    assert set(draw(logits, rows).tolist()) == {3, 100, 200}


PENALTIES = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
)


@settings(max_examples=15 if not HAS_GPU else 200, deadline=None)
@given(sampling=st.lists(PENALTIES, min_size=1, max_size=3), seed=st.integers(0, 2**31))
def test_penalized_draws_are_those_of_the_sampler(sampling, seed):
    contexts = [[5, 9, 9, 700, 5, 5, 5, 9, 650, 3], [1, 2], [8] * 40 + [9]]
    rows = [Row(one, contexts[at], 3 if at != 1 else 2, (), seed + at, 0) for at, one in enumerate(sampling)]
    logits = normal(len(rows), 1000, seed=seed % 1000)
    logits[:, [3, 5, 8, 9, 650, 700]] += 4.0
    assert draw(logits, rows).tolist() == sample(logits.cpu().clone(), rows)


def test_a_drawn_token_is_counted_and_kept_in_its_slot():
    counts = torch.zeros(3, 50, dtype=torch.int16, device=DEVICE)
    count_tokens(counts[2], [4, 7, 7, 4, 9], 2)
    assert counts[2, [4, 7, 9]].tolist() == [-(2**15) + 1, -(2**15) + 1, 1]
    counts[0, 20] = 2**15 - 1
    logits = torch.zeros(3, 50, device=DEVICE)
    logits[0, 20], logits[1, 4], logits[2, 0] = 5.0, 5.0, torch.nan
    rows = [Row(SamplingParams(temperature=0.0), [1], 1, (), 0, 0)] * 3
    last = torch.full((4,), 33, device=DEVICE)
    seen = gpu_sampling.Seen(counts, torch.tensor([0, 2, 1], device=DEVICE), last)
    assert gpu_sampling.draw_tokens(logits, draws_of(rows), seen).tolist() == [20, 4, -1]
    assert counts[2, 4] == -(2**15) + 2
    assert counts[0, 20] == 2**15 - 1, "a count does not run over"
    assert not counts[1].any()
    assert last.tolist() == [20, -1, 4, 33]


def test_inputs_of_a_decode_step():
    tables = torch.zeros(4, 5, dtype=torch.int64, device=DEVICE)
    tables[1, :2] = torch.tensor([7, 8])
    tables[2, 0] = 4
    last = torch.tensor([10, 11, 12, -1], device=DEVICE)
    slots = torch.tensor([2, 1, 3], device=DEVICE)
    context_lens = torch.tensor([17, 20, 0], device=DEVICE)
    new_blocks = torch.tensor([9, -1, -1], device=DEVICE)
    ids, positions, places, made = gpu_inputs.decode_inputs(slots, context_lens, new_blocks, last, tables, 16)
    assert ids.tolist() == [12, 11, 0]
    assert positions.tolist() == [16, 19, 0]
    assert places.tolist() == [9 * 16, 8 * 16 + 3, -1]
    assert made[0, :2].tolist() == [4, 9]
    assert made[1, :2].tolist() == [7, 8]
    assert tables[2].tolist() == [4, 9, 0, 0, 0]
