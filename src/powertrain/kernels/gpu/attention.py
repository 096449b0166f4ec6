"""Paged attention of one step in Triton: the leading decodes, then the chunks of prompts."""

from __future__ import annotations

import torch

from powertrain.kernels.attention import AttentionStep, LayerCache, entries
from powertrain.kernels.gpu.decode_attention import decode_attention, split_decodes
from powertrain.kernels.gpu.launch import num_processors
from powertrain.kernels.gpu.prefill_attention import make_tiles, prefill_attention, tile_tokens
from powertrain.kernels.gpu.whole_prompts import WholePrompt, attend, whole_prompts


def paged_attention(query: torch.Tensor, cache: LayerCache, step: AttentionStep, window: int | None) -> torch.Tensor:
    """`kernels.attention.paged_attention`: the leading decodes, then the chunks of prompts."""
    num_decodes, num_kv_heads = step.num_decodes, entries(cache).shape[2] // 2
    whole = whole_prompts(step, query, window)
    if len(whole) == len(step.query_lens) == 1:
        return attend(query, cache, step, whole[0])  # all there is: into no other tensor
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if num_decodes:
        split = step.shared.get("split")
        if split is None:
            longest = max(step.context_lens[:num_decodes])
            processors = num_processors(query.device)
            split = split_decodes(step.context_lens_tensor, longest, num_kv_heads, processors)
            step.shared["split"] = split
        decode_attention(
            query[:num_decodes], cache, step.block_tables, step.context_lens_tensor, split, window, out[:num_decodes]
        )
    if num_decodes < len(step.query_lens):
        _prompts(query, cache, step, window, whole, out)
    return out


def _prompts(
    query: torch.Tensor,
    cache: LayerCache,
    step: AttentionStep,
    window: int | None,
    whole: list[WholePrompt],
    out: torch.Tensor,
) -> None:
    """Chunks in tiles over the paged cache; long prompts that are whole by the library."""
    for prompt in whole:
        out[prompt.first_row : prompt.first_row + prompt.num_tokens] = attend(query, cache, step, prompt)
    if len(whole) == len(step.query_lens) - step.num_decodes:
        return
    tiles = step.shared.get(("tiles", len(whole)))
    if tiles is None:
        tokens = tile_tokens(query.shape[1] // (entries(cache).shape[2] // 2))
        tiles = make_tiles(step, tokens, {prompt.sequence for prompt in whole})
        step.shared["tiles", len(whole)] = tiles
    prefill_attention(query, cache, step.block_tables, tiles, window, out)
