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


@triton.jit
def wait_turn(PDL: tl.constexpr):
    """First of all, before anything is read that the kernels before this one have written."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines at `pointers`, without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def launch_options(x: torch.Tensor) -> dict[str, Any]:
    """What every launch on x's device adds to its arguments."""
    return {"PDL": True, "launch_pdl": True} if x.is_cuda and _has_dependent_launch(x.device) else {"PDL": False}


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
