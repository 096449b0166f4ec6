"""The sum of a product's pieces, in their order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powertrain.kernels.gpu.launch import launch, launch_options, wait_turn


@triton.jit(do_not_specialize=["size"])
def _sum_splits_kernel(partial, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_turn(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * size + at, inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


def sum_splits(partial: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The sum of float32 partial [splits, rows, out] over its splits, in their order, into `out`."""
    size = out.numel()
    launch(_sum_splits_kernel, (triton.cdiv(size, 1024),))(
        partial, out, size, SPLITS=partial.shape[0], BLOCK=1024, **launch_options(out)
    )
    return out
