"""The 4-bit study of the KV cache: full blocks on their grids, by a plain float64 loop; the newest tokens untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import CacheConfig, EngineConfig, resolve
from powertrain.kernels.attention import AttentionStep, RoundedCache, gather, round_to_4_bits, write_kv
from powertrain.types import PowertrainError

BLOCK, HEADS, DIM = 8, 2, 64


def assert_rounded(found: torch.Tensor, run: np.ndarray) -> None:
    """`found` holds one run of numbers on 16 steps of its range, each the nearest to its own; at a tie either."""
    low = float(np.float16(run.min()))
    scale = float(np.float16((run.max() - low) / 15))
    steps = (found.double().numpy() - low) / scale
    np.testing.assert_allclose(steps, steps.round().clip(0, 15), atol=1e-2)
    # the ends of the range are rounded to 16 bits themselves
    np.testing.assert_allclose(found, run, rtol=0, atol=0.501 * scale + 1e-3)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), stops=st.lists(st.integers(1, 24), min_size=1, max_size=5, unique=True))
def test_full_blocks_are_rounded_and_the_newest_tokens_are_not(seed: int, stops: list[int]) -> None:
    cache = RoundedCache(torch.zeros(3, BLOCK, 2 * HEADS, DIM))
    written = torch.randn(24, 2 * HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    start = 0
    for stop in sorted(stops):  # however the tokens are cut into steps
        write_kv(written[start:stop], cache, AttentionStep.of_one(start, stop, BLOCK, torch.device("cpu")))
        start = stop
    found = gather(cache, torch.arange(3), torch.float32)
    num_full = start // BLOCK * BLOCK
    assert torch.equal(found[num_full:start], written[num_full:start])
    wanted = written[:num_full].double().numpy().reshape(-1, BLOCK, 2 * HEADS, DIM)
    for block, head in np.ndindex(len(wanted), HEADS):
        for channel in range(DIM):
            keys = found[:num_full].view(-1, BLOCK, 2 * HEADS, DIM)[block, :, head, channel]
            assert_rounded(keys, wanted[block, :, head, channel])
        for token in range(BLOCK):
            row = wanted[block, token, HEADS + head]
            values = found[:num_full].view(-1, BLOCK, 2 * HEADS, DIM)[block, token, HEADS + head]
            for part in (slice(0, 32), slice(32, 64)):
                assert_rounded(values[part], row[part])


def test_a_run_has_at_most_sixteen_values_and_constants_stay() -> None:
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    rounded = round_to_4_bits(x, dim=-1)
    assert all(len(row.unique()) <= 16 for row in rounded)
    assert float((rounded - x).abs().max()) < float((x.amax(1) - x.amin(1)).max()) / 29
    assert torch.equal(round_to_4_bits(torch.full((2, 3), 0.5), dim=-1), torch.full((2, 3), 0.5))
    assert torch.equal(round_to_4_bits(torch.zeros(2, 3), dim=0), torch.zeros(2, 3))


def test_a_model_with_4_bits_is_near_and_with_8_bits_nearer(tiny_model_dir: Callable[[str], Path]) -> None:
    model = load_model(open_checkpoint(tiny_model_dir("qwen2")), "cpu", torch.float32)
    ids = torch.arange(5, 133)
    exact = model.score(ids)
    four, eight = (model.with_kv_cache_dtype(dtype).score(ids, chunk=40) for dtype in ("int4", "int8"))
    errors = [float((found - exact).norm() / exact.norm()) for found in (eight, four)]
    assert 0 < errors[0] < errors[1] < 0.3
    # the first 32 tokens end in one chunk with the block that they fill: 31 alone fill none
    assert torch.equal(model.with_kv_cache_dtype("int4").score(ids[:31]), model.score(ids[:31]))
    assert model.with_kv_cache_dtype("int4").kv_bytes_per_token() == model.kv_bytes_per_token()


@pytest.mark.parametrize("kernels", ["auto", "native"])
def test_only_the_reference_runs_it(kernels: str) -> None:
    config = EngineConfig(device="cpu", kernels=kernels, cache=CacheConfig(kv_cache_dtype="int4"))  # type: ignore[arg-type]
    with pytest.raises(PowertrainError, match=r"int4 is a study of accuracy"):
        resolve(config, has_cuda=False, model_dtype="float32")
