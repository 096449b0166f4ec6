"""Small ops around the matrix products: RMSNorm, rotary embedding, gated activation."""

from __future__ import annotations

import torch

from powertrain.kernels.gpu_provider import BY_ROW, refuse_gaps, triton_provider
from powertrain.kernels.op import Op


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    x: [..., d] any float dtype; weight: [d]. The mean is taken in float32, the result has x's dtype.
    """
    # Written out: torch's own rms_norm decomposes into more, slower calls on a CPU.
    wide = x if x.dtype == torch.float32 else x.to(torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    normed = wide * inverse
    return normed.mul_(weight) if x.dtype == torch.float32 else normed.to(x.dtype) * weight


def _add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, before_narrow: bool = False
) -> torch.Tensor:
    """x += delta, in place; then the norm of x. Both [..., d], contiguous, of one dtype.

    Or delta is float32 [pieces, ..., d], a product left in pieces: then their sum is added, rounded to x's dtype.
    `before_narrow`: a product with weights of 8 bits or less follows, which a provider may time its launch by.
    """
    return _rms_norm(x.add_(sum_pieces(delta, x)), weight, eps)


def sum_pieces(delta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What `delta` adds to x [..., d]: itself, or the sum of a product's pieces."""
    return delta.sum(0).to(x.dtype) if delta.ndim > x.ndim else delta


def _apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, half-split convention (Su et al. 2021, arXiv 2104.09864), in place; returns x.

    x: [tokens, heads, d]; cos, sin: [tokens, 1, d] with the two halves repeated and sin's first half negated, so that
    the rotation is one multiply-add on x and one on x with its halves swapped.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x.mul_(cos).addcmul_(swapped, sin)


def _silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's inner product (Shazeer 2020, arXiv 2002.05202): silu(gate) * up, for [tokens, 2 f] = gate | up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


rms_norm = Op("rms_norm", _rms_norm, (triton_provider("fused", "rms_norm", refuse_gaps, BY_ROW),))
add_rms_norm = Op("add_rms_norm", _add_rms_norm, (triton_provider("fused", "add_rms_norm", refuse_gaps, BY_ROW),))
apply_rope = Op("apply_rope", _apply_rope)
silu_mul = Op("silu_mul", _silu_mul, (triton_provider("fused", "silu_mul", refuse_gaps, BY_ROW),))
