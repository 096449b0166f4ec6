"""The gated activation where gate and up are in registers (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import triton.language as tl

from powertrain.kernels.gpu.launch import device_function


@device_function
def gated(gate, up, dtype: tl.constexpr):
    """silu(gate) * up in float32, rounded where the product and the activation would be, were they apart."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return silu * up.to(dtype).to(tl.float32)
