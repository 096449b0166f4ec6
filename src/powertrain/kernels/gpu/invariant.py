"""Products and attention on a GPU whose every row has the same bits whatever rows stand beside it.

The tiles, the pieces of the inputs and their order depend on the matrix alone; rows are taken some at a time. A token
of a prompt attends as a decode does, over its own context in pieces of one length, so that neither chunks nor
preemption show. After He et al. 2025, *Defeating Nondeterminism in LLM Inference*.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from powertrain.kernels.attention import AttentionStep, LayerCache, entries
from powertrain.kernels.fused import silu_mul
from powertrain.kernels.gpu.decode_attention import DecodeConfig, decode_attention, split_decodes
from powertrain.kernels.gpu.int4_matmul import int4_product
from powertrain.kernels.gpu.launch import num_processors
from powertrain.kernels.gpu.quantized import QuantizedConfig, matrix_product
from powertrain.kernels.quantized import FLOAT8_BLOCK, Int4Blocks

ROWS = 128
"""Rows of one product."""

PIECE = 256
"""Positions of a context that are summed apart."""

MAX_PIECES = 8192
"""Of one launch: their sums are 512 floats each for every key head."""

_DECODE = DecodeConfig(64, 2, 4, 3)


def dense_linear(x: torch.Tensor, weight: torch.Tensor, keeps_pieces: bool = False) -> torch.Tensor:
    """`kernels.matmul.dense_linear`, always summed."""
    return _scaled_linear(x, weight, None)


def gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`kernels.matmul.gated_linear`."""
    return silu_mul(_scaled_linear(x, weight, None))


def int8_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`kernels.matmul.int8_linear`."""
    return _scaled_linear(x, values, scale)


def int8_rounded_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`kernels.quantized.int8_rounded_linear`, whose input is not rounded here, for any number of rows."""
    return _scaled_linear(x, values, scale)


def float8_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    scale: torch.Tensor,
    rounds_input: bool,
    is_gated: bool,
    keeps_pieces: bool = False,
) -> torch.Tensor:
    """`kernels.quantized.float8_linear`, whose input is not rounded here, for any number of rows."""
    product = _scaled_linear(x, values, scale)
    return silu_mul(product) if is_gated else product


def int4_linear(x: torch.Tensor, weight: Int4Blocks, is_gated: bool, keeps_pieces: bool = False) -> torch.Tensor:
    """`kernels.quantized.int4_blocks_linear`."""
    num_blocks, out_features, _ = weight.values.shape
    config = _config(out_features, num_blocks)
    product = _in_parts(x, out_features, lambda rows: int4_product(rows, weight, config))
    return silu_mul(product) if is_gated else product


def _scaled_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    out_features, in_features = values.shape
    config = _config(out_features, -(-in_features // FLOAT8_BLOCK))
    return _in_parts(x, out_features, lambda rows: matrix_product(rows, values, scale, config))


def _config(out_features: int, turns: int) -> QuantizedConfig:
    """Enough programs for every processor of a large GPU at one row; of the matrix's shape alone."""
    splits = 1
    while splits < 8 and splits * out_features < 264 * 64 and turns >= 16 * splits:
        splits *= 2
    return QuantizedConfig(outputs=64, splits=splits, swaps=True, num_warps=4, num_stages=3)


def _in_parts(x: torch.Tensor, out_features: int, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if x.shape[0] <= ROWS:
        return multiply(x)
    out = torch.empty(x.shape[0], out_features, dtype=x.dtype, device=x.device)
    for first in range(0, x.shape[0], ROWS):
        out[first : first + ROWS] = multiply(x[first : first + ROWS])
    return out


def paged_attention(query: torch.Tensor, cache: LayerCache, step: AttentionStep, window: int | None) -> torch.Tensor:
    """`kernels.attention.paged_attention`, every token by itself."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rows = step.shared.get("invariant rows")
    if rows is None:
        rows = step.shared["invariant rows"] = _rows(step)
    context_lens, tables = rows
    num_kv_heads = entries(cache).shape[2] // 2
    longest = max(step.context_lens)
    count = max(1, MAX_PIECES // -(-longest // PIECE))
    for first in range(0, query.shape[0], count):
        part = slice(first, first + count)
        key = ("invariant split", first)
        split = step.shared.get(key)
        if split is None:
            processors = num_processors(query.device)
            split = split_decodes(context_lens[part], longest, num_kv_heads, processors, PIECE, _DECODE)
            step.shared[key] = split
        decode_attention(query[part], cache, tables[part], context_lens[part], split, window, out[part])
    return out


def _rows(step: AttentionStep) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's context, int64 [tokens], and its sequence's table [tokens, blocks]."""
    if step.num_decodes == len(step.query_lens):
        return step.context_lens_tensor, step.block_tables
    counts = torch.tensor(step.query_lens, device=step.device)
    return step.positions + 1, step.block_tables.repeat_interleave(counts, 0)
