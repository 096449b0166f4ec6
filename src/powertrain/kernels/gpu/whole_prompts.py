"""Attention of long prompts that are computed at once, by cuDNN: nothing of them is elsewhere than in this step.

Keys and values are gathered from the cache, which costs a hundredth of the attention itself. cuDNN plans anew for every
length, so prompts are padded to a few lengths; what is padded lies behind every real position and is masked by
causality.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from powertrain.kernels.attention import AttentionStep, LayerCache, entries, gather

SHORTEST = 2048
"""Tokens from which the library is faster than tiles over the paged cache."""

LENGTH_STEP = 1024


class WholePrompt(NamedTuple):
    """A sequence of a step, by number, its first row and its number of rows, which are all its tokens."""

    sequence: int
    first_row: int
    num_tokens: int


def whole_prompts(step: AttentionStep, query: torch.Tensor, window: int | None) -> list[WholePrompt]:
    """The prompts of a step that the library shall take."""
    if query.dtype == torch.float32 or window is not None or query.shape[2] % 8 or query.shape[2] > 128:
        return []
    found, row = [], step.num_decodes
    for sequence in range(step.num_decodes, len(step.query_lens)):
        count = step.query_lens[sequence]
        if count == step.context_lens[sequence] and count >= SHORTEST:
            found.append(WholePrompt(sequence, row, count))
        row += count
    return found


def padded_length(num_tokens: int) -> int:
    return -(-num_tokens // LENGTH_STEP) * LENGTH_STEP


def attend(query: torch.Tensor, cache: LayerCache, step: AttentionStep, prompt: WholePrompt) -> torch.Tensor:
    """Causal attention of one prompt: rows of query [tokens, heads, d] to [num_tokens, heads, d]."""
    num_heads, dim = query.shape[1:]
    block_size, num_kv_heads = entries(cache).shape[1], entries(cache).shape[2] // 2
    length = padded_length(prompt.num_tokens)
    blocks = step.block_tables[prompt.sequence, : -(-prompt.num_tokens // block_size)]
    # its own last block once more: another's could hold what is not finite
    behind = blocks[-1:].expand(-(-length // block_size) - blocks.shape[0])
    keys, values = gather(cache, torch.cat((blocks, behind)), query.dtype)[:length].chunk(2, dim=1)
    padded = query[prompt.first_row : prompt.first_row + prompt.num_tokens]
    if length > prompt.num_tokens:
        padded = torch.cat((padded, query.new_zeros(length - prompt.num_tokens, num_heads, dim)))
    q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (padded, keys, values))
    with _library(query.device):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=num_heads != num_kv_heads)
    return out[0].transpose(0, 1)[: prompt.num_tokens]


def _library(device: torch.device) -> AbstractContextManager[None]:
    if device.type != "cuda":
        return nullcontext()
    context: AbstractContextManager[None] = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
    return context
