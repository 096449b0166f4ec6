"""Programmatic dependent launch: a kernel's blocks take their places while the one before it still runs.

Each kernel lets its successor start at once and then waits until its predecessor's results are there, so what a launch
costs is hidden; only what it reads before `wait_turn` must be older than that, weights say. Hopper and later.

A norm before a product of 8- or 4-bit weights lets that come only with its own turn: several of such a product's
programs fit on a processor, and coming while the product before still runs, they would crowd on the processors that end
first and leave the others idle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

AHEAD_BYTES = 16 * 2**10
"""Weights that a program of a product asks for before its turn: more take the memory from the kernels under way."""

EARLY, LATE = tl.constexpr(1), tl.constexpr(2)
"""When a successor may come: at once, or with the kernel's own turn; 0 where all waits for the end."""

LINE_BYTES = tl.constexpr(128)


def device_function(function: Callable[..., Any]) -> Any:
    """`triton.jit` for what kernels call.

    Triton's key of a kernel in its cache on disk depends on whether the keys of what it calls are known already, so
    that two processes could miss each other's: they are computed here, at once.
    """
    compiled = triton.jit(function)
    if isinstance(compiled, triton.JITFunction):  # not under the interpreter
        _ = compiled.cache_key
    return compiled


@device_function
def wait_turn(PDL: tl.constexpr):
    """First of all, before anything is read that the kernels before this one have written."""
    if PDL == EARLY:
        gdc_launch_dependents()
        gdc_wait()
    if PDL == LATE:
        gdc_wait()
        gdc_launch_dependents()


@device_function
def prefetch(pointers):
    """Ask for the cache lines at `pointers` to be brought to the L2 cache, without waiting.

    Bulk requests (`cp.async.bulk.prefetch`) are issued one by one: measured slower than none.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1
    )


@device_function
def prefetch_rows(rows, first, num_elements, LINES: tl.constexpr):
    """The first LINES cache lines of each row of `num_elements`, from element `first` on; `rows` are pointers."""
    line: tl.constexpr = LINE_BYTES // (rows.dtype.element_ty.primitive_bitwidth // 8)
    at = tl.maximum(tl.minimum(first + tl.arange(0, LINES) * line, num_elements - line), 0)
    prefetch(rows[:, None] + at[None, :])


def lines_ahead(num_rows: int, device: torch.device) -> int:
    """Of each of its `num_rows` rows, the cache lines that a program asks for before its turn; a power of two."""
    if device.type != "cuda" or not _has_dependent_launch(device):
        return 0
    lines: int = AHEAD_BYTES // (LINE_BYTES.value * triton.next_power_of_2(num_rows))
    return max(1, lines)


_is_collecting: ContextVar[bool] = ContextVar("is_collecting", default=False)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """`kernel[grid]`, to be called with its arguments; nothing runs within `collecting_launches`."""
    return partial(kernel.warmup, grid=grid) if _is_collecting.get() else kernel[grid]


@contextmanager
def collecting_launches() -> Iterator[None]:
    """Launches within go as far as Triton's compiler, and nothing runs."""
    token = _is_collecting.set(True)
    try:
        yield
    finally:
        _is_collecting.reset(token)


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few under the interpreter."""
    if device.type != "cuda":
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def launch_options(x: torch.Tensor, *, is_late: bool = False) -> dict[str, Any]:
    """What every launch on x's device adds to its arguments; `is_late`: the successor comes with the kernel's turn."""
    if not x.is_cuda or not _has_dependent_launch(x.device):
        return {"PDL": 0}
    return {"PDL": LATE.value if is_late else EARLY.value, "launch_pdl": True}


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
