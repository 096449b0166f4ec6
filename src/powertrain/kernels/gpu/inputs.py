"""What a captured decode step reads, made on the device from where each sequence stands."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powertrain.kernels.gpu.launch import launch, launch_options, wait_turn

_OF_ROWS = ["slots", "context_lens", "new_blocks", "token_ids", "positions", "places"]
"""Parts of one tensor: where they begin depends on the number of rows, for which nothing shall be compiled anew."""


@triton.jit(do_not_specialize_on_alignment=_OF_ROWS)
def _decode_inputs_kernel(
    slots,
    context_lens,
    new_blocks,
    last_tokens,
    tables,
    token_ids,
    positions,
    places,
    block_tables,
    table_width,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_turn(PDL)
    row = tl.program_id(0)
    slot, context = tl.load(slots + row), tl.load(context_lens + row)
    position = tl.maximum(context - 1, 0)
    own = tables + slot * table_width
    new = tl.load(new_blocks + row)
    if new >= 0:
        tl.store(own + position // BLOCK_SIZE, new)
        tl.debug_barrier()
    # a row that failed left -1 behind; it is padding to those after it
    tl.store(token_ids + row, tl.maximum(tl.load(last_tokens + slot), 0))
    tl.store(positions + row, position)
    block = tl.where(new >= 0, new, tl.load(own + position // BLOCK_SIZE))
    tl.store(places + row, tl.where(context > 0, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    for start in range(0, tl.cdiv(context, BLOCK_SIZE), BLOCK):
        columns = start + tl.arange(0, BLOCK)
        entry = tl.load(own + columns, columns < table_width, other=0)
        entry = tl.where((new >= 0) & (columns == position // BLOCK_SIZE), new, entry)
        tl.store(block_tables + row * table_width + columns, entry, columns < table_width)


def decode_inputs(
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    new_blocks: torch.Tensor,
    last_tokens: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, positions, cache places and block tables of one token per sequence.

    slots, context_lens, new_blocks: int64 [rows]: the sequence's row of `last_tokens` [slots] and `tables` [slots,
    blocks], its length with this token (0 for padding), and the block that begins with it or -1, which `tables` gains.
    Returns int64 [rows] thrice, a place being block * block_size + offset or -1, and [rows, blocks].
    """
    num_rows, width = slots.shape[0], tables.shape[1]
    numbers = torch.empty(3, num_rows, dtype=torch.int64, device=slots.device)
    token_ids, positions, places = numbers.unbind()
    block_tables = torch.empty(num_rows, width, dtype=torch.int64, device=slots.device)
    launch(_decode_inputs_kernel, (num_rows,))(
        slots,
        context_lens,
        new_blocks,
        last_tokens,
        tables,
        token_ids,
        positions,
        places,
        block_tables,
        width,
        BLOCK_SIZE=block_size,
        BLOCK=256,
        num_warps=1,
        **launch_options(slots),
    )
    return token_ids, positions, places, block_tables
