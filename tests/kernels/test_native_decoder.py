"""The native decoder: a step is its single ops bit for bit, equals transformers, and no row depends on its company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_builders import FAMILIES
from native_builders import (
    BLOCK_SIZE,
    LEVELS,
    NATIVE,
    VOCAB,
    each_level,
    generator,
    needs_native,
    random_ids,
    step_of,
)
from powertrain.config import KVCacheDType
from powertrain.kernels.attention import AttentionStep
from powertrain.model.decoder import Decoder
from powertrain.model.layers import Linear
from powertrain.model.native_decoder import Backend, NativeDecoder
from powertrain.model.packed import Grid, PackedMatrix, pack

pytestmark = needs_native

KV_TYPES: tuple[KVCacheDType, ...] = ("float32", "float16", "int8")
MODELS = [*((family, "") for family in FAMILIES), ("llama", "Q8_0"), ("qwen2", "Q4_1"), ("qwen3", "F16")]
each_model = pytest.mark.parametrize("name", MODELS, ids=lambda name: " ".join(name).strip())

float_and_integer = pytest.mark.parametrize("name", [("qwen2", "F16"), ("llama", "Q8_0")], ids=["float", "integer"])

Models = Callable[..., NativeDecoder]


# ---- against others ----


@each_level
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [512, 7, 1])
def test_float32_logits_equal_transformers(
    native_model: Models, tiny_model_dir: Callable[[str], Path], level: str, family: str, chunk: int
) -> None:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir(family), dtype=torch.float32).eval()
    ids = random_ids(90, seed=3)
    with torch.inference_mode():
        expected = theirs(ids.unsqueeze(0)).logits[0].float()
    logits = native_model((family, ""), level).with_kv_cache_dtype("float32").score(ids, chunk=chunk)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kv_type", "allowed"), [("float16", 4e-3), ("int8", 0.1)])
def test_a_rounded_cache_costs_little(native_model: Models, kv_type: KVCacheDType, allowed: float) -> None:
    model, ids = native_model(("llama", "")), random_ids(120)
    exact = model.with_kv_cache_dtype("float32").score(ids)
    rounded = model.with_kv_cache_dtype(kv_type).score(ids)
    assert 0 < float((rounded - exact).norm() / exact.norm()) < allowed


# ---- a step is its ops ----


@dataclass
class OpByOp:
    """The step of a native decoder made of the module's single ops and torch's additions."""

    decoder: NativeDecoder
    team: Any
    cache: Any

    def product(self, linear: Linear, x: Tensor) -> Tensor:
        parts = []
        for part in linear.formats:
            assert isinstance(part, PackedMatrix)
            parts.append(torch.empty(x.shape[0], part.out_features))
            NATIVE.matmul(self.team, part.matrix, x, parts[-1])
        out = torch.cat(parts, dim=1)
        return out if linear.bias is None else out + linear.bias

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        rows, out = x.reshape(-1, weight.shape[0]).contiguous(), torch.empty(x.numel() // len(weight), len(weight))
        NATIVE.rms_norm(self.team, rows, weight, self.decoder.config.rms_norm_eps, out)
        return out.view(x.shape)

    def forward(self, ids: Tensor, step: AttentionStep) -> Tensor:
        x = torch.empty(len(ids), self.decoder.config.hidden_size)
        NATIVE.gather(self.team, self.decoder.packed_embedding.matrix, ids, x)
        for layer, block in enumerate(self.decoder.blocks):
            x = x + self.attention(layer, self.norm(x, block.attention_norm.weight), step)
            gate_up = self.product(block.mlp.gate_up, self.norm(x, block.mlp_norm.weight))
            inner = torch.empty(len(ids), gate_up.shape[1] // 2)
            NATIVE.silu_mul(self.team, gate_up, inner)
            x = x + self.product(block.mlp.down, inner)
        return x

    def attention(self, layer: int, x: Tensor, step: AttentionStep) -> Tensor:
        config, attention = self.decoder.config, self.decoder.blocks[layer].attention
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = self.product(attention.qkv, x).view(len(x), heads + 2 * kv_heads, dim)
        query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
        if attention.query_norm is not None and attention.key_norm is not None:
            query, key = self.norm(query, attention.query_norm.weight), self.norm(key, attention.key_norm.weight)
        rotated = torch.cat((query, key), dim=1).contiguous()
        cos, sin = (table[step.positions].contiguous() for table in self.decoder.rope.tables())
        NATIVE.apply_rope(self.team, rotated, cos, sin)
        where = np.array(step.query_lens, dtype=np.int32), np.array(step.context_lens, dtype=np.int32), step.tables
        key_value = torch.cat((rotated[:, heads:], value), dim=1).flatten(1)
        NATIVE.write_kv(self.team, key_value, self.cache, layer, *where)
        out = torch.empty(len(x), heads * dim)
        query = rotated[:, :heads].flatten(1).contiguous()
        NATIVE.paged_attention(self.team, query, self.cache, layer, *where, attention.window or 0, out)
        return self.product(attention.output, out)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.product(self.decoder.head, self.norm(hidden, self.decoder.norm.weight))


@each_level
@each_model
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_step_is_its_ops_bit_for_bit(
    native_model: Models, level: str, name: tuple[str, str], kv_type: KVCacheDType
) -> None:
    model = native_model(name, level)
    model.kv_cache_dtype = kv_type
    whole, parts = model.new_cache(6, BLOCK_SIZE), model.new_cache(6, BLOCK_SIZE)
    apart = OpByOp(model, NATIVE.Team(1, level), parts.native)
    tables = [[5, 0], [2], [1, 4]]
    for turn, sequences in enumerate(([(20, 20), (9, 9), (1, 1)], [(1, 21), (4, 13), (30, 31)])):
        step = step_of(sequences, tables)
        ids = random_ids(sum(step.query_lens), seed=turn)
        hidden = model.forward(ids, step, whole)
        assert torch.equal(hidden, apart.forward(ids, step))
        assert torch.equal(model.logits(hidden), apart.logits(hidden))


@each_level
@pytest.mark.parametrize("intermediate", [16, 24, 40, 96, 100])
@pytest.mark.parametrize("is_split", [False, True])
def test_an_mlp_of_any_width_and_with_biases_is_its_ops(
    native_model: Models, level: str, intermediate: int, is_split: bool
) -> None:
    """Widths that end inside a panel or a block; gate and up in one interleaved stream or in two; 8-bit activations."""
    model = native_model(("qwen2", ""), level)
    team = NATIVE.Team(2, level)

    def part(rows: int, cols: int, seed: int) -> Grid:
        source, blocks = generator(seed), -(-cols // 32)
        codes = torch.randint(0, 256, (rows, blocks, 16), dtype=torch.uint8, generator=source)
        scale = torch.rand(rows, blocks, generator=source).half() / 50
        return Grid("u4", cols, codes, scale, scale * -7, True)

    def packed(*parts: Grid, is_gate_up: bool = False) -> PackedMatrix:
        return PackedMatrix(*pack(parts, is_gate_up), NATIVE, team)

    hidden = model.config.hidden_size
    gate, up = part(intermediate, hidden, 1), part(intermediate, hidden, 2)
    formats = [packed(gate), packed(up)] if is_split else [packed(gate, up, is_gate_up=True)]
    source = generator(9)
    biases = torch.randn(2 * intermediate, generator=source), torch.randn(hidden, generator=source)
    down = Linear([packed(part(hidden, intermediate, 3))], biases[1])
    blocks = []
    for block in model.blocks:
        attention = replace(block.attention, output=Linear(block.attention.output.formats, biases[1]))
        mlp = replace(block.mlp, gate_up=Linear(list(formats), biases[0]), down=down)
        blocks.append(replace(block, attention=attention, mlp=mlp))
    config = replace(model.config, intermediate_size=intermediate)
    other = NativeDecoder(
        config, model.packed_embedding, blocks, model.norm, model.head, model.rope, Backend(NATIVE, team)
    )
    caches = other.new_cache(2, BLOCK_SIZE), other.new_cache(2, BLOCK_SIZE)
    for count in (1, 2, 7, 20):
        step, ids = step_of([(count, count)], [[1, 0]]), random_ids(count)
        expected = OpByOp(other, NATIVE.Team(1, level), caches[1].native).forward(ids, step)
        assert torch.equal(other.forward(ids, step, caches[0]), expected)


# ---- the same bits in any company ----


@each_level
@each_model
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_company_chunks_and_threads_change_no_bit(
    native_model: Models, level: str, name: tuple[str, str], kv_type: KVCacheDType
) -> None:
    """A prompt at once on one thread = in pieces beside other sequences on two and three, in other blocks."""
    ids, others = random_ids(300, seed=1), random_ids(200, seed=2)
    alone = native_model(name, level, 1)
    alone.kv_cache_dtype = kv_type
    cache = alone.new_cache(20, BLOCK_SIZE)
    hidden = alone.forward(ids, step_of([(300, 300)], [range(19)]), cache)
    logits = alone.logits(hidden)
    for threads, pieces in ((2, (1, 6, 64, 70, 159)), (3, (255, 2, 43))):
        model = native_model(name, level, threads)
        model.kv_cache_dtype = kv_type
        cache = model.new_cache(40, BLOCK_SIZE)
        tables = [range(39, 20, -1), range(20)]
        stop, parts = 0, []
        for piece in pieces:
            stop += piece
            step = step_of([(3, 3 * len(parts) + 3), (piece, stop)], [tables[1], tables[0]])
            batch = torch.cat((others[3 * len(parts) : 3 * len(parts) + 3], ids[stop - piece : stop]))
            parts.append(model.forward(batch, step, cache)[3:])
        assert torch.equal(torch.cat(parts), hidden)
        assert torch.equal(model.logits(hidden), logits)
        assert torch.equal(model.logits(hidden[7:8]), logits[7:8])
        assert torch.equal(model.logits(hidden[5:100]), logits[5:100])
    decode = alone.forward(ids[-1:], step_of([(1, 300)], [range(19)]), alone_cache(alone, ids))
    assert torch.equal(decode, hidden[-1:])


def alone_cache(model: NativeDecoder, ids: Tensor) -> Any:
    cache = model.new_cache(20, BLOCK_SIZE)
    model.forward(ids[:-1], step_of([(len(ids) - 1, len(ids) - 1)], [range(19)]), cache)
    return cache


# ---- the largest logits ----


def check_top(model: Decoder, hidden: Tensor, k: int) -> None:
    values, ids, finite = model.top_logits(hidden, k)
    expected, order = model.logits(hidden).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected[:, :k])
    assert torch.equal(ids, order[:, :k])
    assert bool(finite.all())


@each_level
@pytest.mark.parametrize("threads", [1, 3])
def test_top_is_the_sorted_head(native_model: Models, level: str, threads: int) -> None:
    for name in (("llama", "Q8_0"), ("qwen3", "")):
        model = native_model(name, level, threads)
        for rows in (1, 2, 5, 70):
            hidden = torch.randn(rows, model.config.hidden_size, generator=generator(rows))
            for k in (1, 2, 5, 20, 64, 65, VOCAB):
                check_top(model, hidden, k)


@pytest.fixture(scope="module")
def tied_head(native_model: Models) -> Callable[[list[int], str, int], NativeDecoder]:
    """A model whose head row i is copy number `pattern[i]` of a few rows: as many equal logits as one wants."""

    def get(pattern: list[int], level: str, threads: int) -> NativeDecoder:
        model = native_model(("llama", ""))
        rows = torch.randn(max(pattern) + 1, model.config.hidden_size, generator=generator(4))
        team = NATIVE.Team(threads, level)
        head = PackedMatrix(*pack([rows[pattern]]), NATIVE, team)
        embedding = PackedMatrix(*pack([rows[pattern]]), NATIVE, team)
        config = replace(model.config, vocab_size=len(pattern))
        parts = (config, embedding, model.blocks, model.norm, Linear([head]), model.rope)
        return NativeDecoder(*parts, Backend(NATIVE, team))

    return get


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_among_equal_logits_the_lower_id_comes_first(tied_head: Any, data: st.DataObject) -> None:
    pattern = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=200))
    model = tied_head(pattern, data.draw(st.sampled_from(LEVELS)), data.draw(st.integers(1, 4)))
    hidden = torch.randn(data.draw(st.integers(1, 5)), model.config.hidden_size, generator=generator(1))
    check_top(model, hidden, data.draw(st.integers(1, min(65, len(pattern)))))


@each_level
def test_equal_logits_on_many_threads(tied_head: Any, level: str) -> None:
    """Whichever thread takes which part of the head, in many runs."""
    model = tied_head([0] * 1500, level, 4)
    hidden = torch.randn(2, model.config.hidden_size, generator=generator(1))
    for _ in range(50):
        values, ids, _ = model.top_logits(hidden, 33)
        assert torch.equal(ids, torch.arange(33).expand(2, 33))
        assert bool((values == values[:, :1]).all())


@each_level
@float_and_integer
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_flagged_alone(
    native_model: Models, level: str, name: tuple[str, str], poison: float
) -> None:
    model = native_model(name, level)
    hidden = torch.randn(6, model.config.hidden_size, generator=generator(2))
    clean = model.top_logits(hidden, 5)
    hidden[4, 17] = poison
    values, ids, finite = model.top_logits(hidden, 5)
    assert finite.tolist() == [True, True, True, True, False, True]
    rest = [0, 1, 2, 3, 5]
    assert torch.equal(values[rest], clean[0][rest])
    assert torch.equal(ids[rest], clean[1][rest])


@each_level
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_weight_of_the_head_is_flagged_wherever_it_is(native_model: Models, level: str, weight: float) -> None:
    """Not only where it is among the largest."""
    model = native_model(("llama", ""), level)
    for at in (0, 15, 16, 161, 319):
        rows = torch.randn(VOCAB, model.config.hidden_size, generator=generator(4))
        rows[at, 3] = weight
        head = Linear([PackedMatrix(*pack([rows]), NATIVE, NATIVE.Team(1))])
        parts = (model.config, model.packed_embedding, model.blocks, model.norm, head, model.rope)
        other = NativeDecoder(*parts, Backend(NATIVE, NATIVE.Team(3, level)))
        hidden = torch.randn(2, model.config.hidden_size, generator=generator(2))
        assert other.top_logits(hidden, 2)[2].tolist() == [False, False]


@each_level
@float_and_integer
def test_a_sequence_that_is_not_finite_does_not_touch_the_others(
    native_model: Models, level: str, name: tuple[str, str]
) -> None:
    model = native_model(name, level)
    weights = model.packed_embedding.unpack()
    weights[7] = torch.nan
    embedding = PackedMatrix(*pack([weights]), NATIVE, NATIVE.Team(1))
    parts = (model.config, embedding, model.blocks, model.norm, model.head, model.rope)
    other = NativeDecoder(*parts, Backend(NATIVE, NATIVE.Team(2, level)))
    step = step_of([(5, 5), (3, 3), (1, 1)], [[0], [1], [2]])
    ids = torch.tensor([20, 21, 22, 23, 24, 30, 7, 31, 40])
    bad, clean = (one.forward(ids, step, one.new_cache(3, BLOCK_SIZE)) for one in (other, model))
    assert torch.equal(bad[:5], clean[:5])
    assert torch.equal(bad[8:], clean[8:])
    assert not bad[6:8].isfinite().any()
    assert other.top_logits(bad, 1)[2].tolist()[6:8] == [False, False]
    # the blocks of the bad sequence serve the next one as if nothing had been
    cache = other.new_cache(3, BLOCK_SIZE)
    other.forward(ids, step, cache)
    fresh = step_of([(3, 3)], [[1]])
    assert torch.equal(other.forward(ids[:3], fresh, cache), bad[:3])
