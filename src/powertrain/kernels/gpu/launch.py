"""Programmatic dependent launch: a kernel's blocks take their places while the one before it still runs.

Each kernel lets its successor start at once and then waits until its predecessor's results are there, so what a launch
costs is hidden; only what it reads before `wait_turn` must be older than that, weights say. Hopper and later.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

AHEAD_BYTES = 16 * 2**20
"""Weights that a product asks for while the kernels before it still run: a good part of the L2 cache."""


@triton.jit
def wait_turn(PDL: tl.constexpr):
    """First of all, before anything is read that the kernels before this one have written."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(pointers, num_bytes):
    """Ask for `num_bytes` from each of `pointers` to be brought to the L2 cache, without waiting; multiples of 16."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [pointers.to(tl.int64), num_bytes + tl.zeros(pointers.shape, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_rows(rows, first, num_elements, num_bytes):
    """`num_bytes`, a multiple of 128, of each row of `num_elements` from element `first` on; `rows` are pointers."""
    piece = num_bytes // (rows.dtype.element_ty.primitive_bitwidth // 8) // 8
    prefetch(rows[:, None] + tl.minimum(first + tl.arange(0, 8) * piece, num_elements - piece)[None, :], num_bytes // 8)


def bytes_ahead(grid: tuple[int, int], outputs: int, row_bytes: int, device: torch.device) -> int:
    """Of each of its `outputs` rows, what a program of a product asks for before its turn: a multiple of 128.

    The grid is one of outputs and splits of the row. The programs that are first on the processors share the budget.
    """
    if device.type != "cuda" or not _has_dependent_launch(device) or row_bytes % 16:
        return 0
    fits = AHEAD_BYTES // (min(grid[0] * grid[1], num_processors(device)) * outputs)
    return min(fits, row_bytes // grid[1]) // 128 * 128


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few under the interpreter."""
    if device.type != "cuda":
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def launch_options(x: torch.Tensor) -> dict[str, Any]:
    """What every launch on x's device adds to its arguments."""
    return {"PDL": True, "launch_pdl": True} if x.is_cuda and _has_dependent_launch(x.device) else {"PDL": False}


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
