"""Captured decode steps: from the last token of each sequence to its next one, without the host in between."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from powertrain.kernels.attention import AttentionStep
from powertrain.model.decoder import Decoder, KVCache

MAX_ROWS = 512
_SMALL_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What stays on the device between steps, by slot; the row past the last slot is for padding.

    last_tokens: int64 [slots + 1]; tables: int64 [slots + 1, blocks]; counts: int16 [slots + 1, vocab], what a
    sequence with penalties holds, as `kernels.gpu.sampling.Seen` has it.
    """

    last_tokens: torch.Tensor
    tables: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def empty(cls, num_slots: int, num_blocks: int, vocab_size: int, device: torch.device) -> DeviceState:
        return cls(
            torch.zeros(num_slots + 1, dtype=torch.int64, device=device),
            torch.zeros(num_slots + 1, num_blocks, dtype=torch.int64, device=device),
            torch.zeros(num_slots + 1, vocab_size, dtype=torch.int16, device=device),
        )

    @property
    def padding_slot(self) -> int:
        return self.last_tokens.shape[0] - 1


@dataclass(frozen=True, slots=True)
class RowInputs:
    """A step's rows as the host hands them over, in one tensor that one copy fills: int64 [8, rows]."""

    numbers: torch.Tensor

    @classmethod
    def empty(cls, num_rows: int, device: torch.device | str, *, pinned: bool = False) -> RowInputs:
        return cls(torch.zeros(8, num_rows, dtype=torch.int64, device=device, pin_memory=pinned))

    @property
    def integers(self) -> torch.Tensor:
        """int64 [4, rows]: slot, length with this token, block that begins with it or -1, top_k."""
        return self.numbers[:4]

    @property
    def floats(self) -> torch.Tensor:
        """float32 [7, rows]: temperature, uniform number, top_p, min_p; repetition, presence, frequency penalty."""
        return self.numbers[4:].view(torch.float32).view(8, -1)[:7]

    def first(self, num_rows: int) -> RowInputs:
        """The same memory for fewer rows, without gaps."""
        return RowInputs(self.numbers.view(-1)[: 8 * num_rows].view(8, num_rows))

    def copy_from(self, other: RowInputs) -> None:
        self.numbers.copy_(other.numbers, non_blocking=True)


def decode_step(model: Decoder, cache: KVCache, state: DeviceState, inputs: RowInputs) -> torch.Tensor:
    """One token for each row: int64 [rows], -1 where its logits were not finite; `state` knows it afterwards."""
    from powertrain.kernels.gpu.inputs import decode_inputs

    slots, context_lens, new_blocks, _ = inputs.integers.unbind()
    made = decode_inputs(slots, context_lens, new_blocks, state.last_tokens, state.tables, cache.block_size)
    token_ids, positions, places, block_tables = made
    step = AttentionStep.of_decodes(positions, context_lens, places, block_tables, cache.block_size)
    return draw_next(model, model.forward(token_ids, step, cache), state, inputs)


def draw_next(model: Decoder, hidden: torch.Tensor, state: DeviceState, inputs: RowInputs) -> torch.Tensor:
    """A token from each row of hidden [rows, hidden] as `inputs` says: int64 [rows], -1 for logits not finite.

    `state` knows them afterwards.
    """
    from powertrain.kernels.gpu.sampling import Draws, Seen, draw_tokens

    temperature, uniform, top_p, min_p, *penalties = inputs.floats.unbind()
    draws = Draws(temperature, uniform, top_p, min_p, inputs.integers[3], *penalties)
    seen = Seen(state.counts, inputs.integers[0], state.last_tokens)
    return draw_tokens(model.raw_logits(hidden).contiguous(), draws, seen)


def compile_decodes(model: Decoder, cache: KVCache, state: DeviceState, max_rows: int) -> int:
    """Compile the kernels of all graphs by many processes, before any of them runs; returns how many were missing.

    Layers are alike: two of them show what all launch, the first adding nothing to the stream before its norm.
    """
    import triton

    from powertrain.kernels.gpu.compile_ahead import collected, compile_missing
    from powertrain.kernels.gpu.inputs import decode_inputs

    few, part = copy.copy(model), copy.copy(cache)
    few.blocks, part.layers = model.blocks[:2], cache.layers[:2]
    with collected() as kernels:
        for size in graph_sizes(max_rows):
            inputs = RowInputs.empty(size, model.device)
            slots, context_lens, new_blocks, _ = inputs.integers.unbind()
            decode_inputs(slots, context_lens, new_blocks, state.last_tokens, state.tables, cache.block_size)
            # its results are not there: the rest goes by zeros
            tables = state.tables.new_zeros(size, state.tables.shape[1])
            step = AttentionStep.of_decodes(slots, context_lens, slots, tables, cache.block_size)
            draw_next(few, few.forward(slots, step, part), state, inputs)
    state.last_tokens.zero_()
    return compile_missing(kernels, triton.runtime.driver.active.get_current_target())


class DecodeGraphs:
    """`decode_step` captured as CUDA graphs for a few numbers of rows, which share their memory."""

    def __init__(self, model: Decoder, cache: KVCache, state: DeviceState, max_rows: int) -> None:
        """Captures at once, largest first: what the smaller ones need fits in its memory."""
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, RowInputs, torch.Tensor]] = {}
        pool = None
        for size in reversed(graph_sizes(max_rows)):
            inputs = RowInputs.empty(size, model.device)
            inputs.integers[0] = state.padding_slot
            inputs.integers[2] = -1
            inputs.floats[4] = 1.0
            decode_step(model, cache, state, inputs)  # compiles, and lets libraries set themselves up
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                tokens = decode_step(model, cache, state, inputs)
            pool = graph.pool()
            self._graphs[size] = (graph, inputs, tokens)
        self.sizes = sorted(self._graphs)

    def size_for(self, num_rows: int) -> int | None:
        """The smallest captured size that holds the rows; None where none does."""
        return next((size for size in self.sizes if size >= num_rows), None)

    def replay(self, size: int, inputs: RowInputs) -> torch.Tensor:
        """Run the step of `size` rows; the result is the graph's own and lasts until the next replay."""
        graph, own, tokens = self._graphs[size]
        own.copy_from(inputs)
        graph.replay()
        return tokens


def graph_sizes(max_rows: int) -> Sequence[int]:
    """Numbers of rows worth a graph, the largest at least `max_rows` unless that is above 512.

    Padding costs little next to the weights that every step reads, so the sizes grow by about a quarter.
    """
    top = min(max_rows, MAX_ROWS)
    sizes = [*_SMALL_SIZES, *range(96, 257, 32), *range(320, MAX_ROWS + 1, 64)]
    return [size for size in sizes if size < top] + [top]
