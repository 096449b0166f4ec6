"""Products with weights that stay quantized in memory. References dequantize; torch's packed CPU kernels do not.

On a CPU a product with few rows is bound by reading the weights, so multiplying the stored 4 or 8 bits wins; with many
rows arithmetic dominates and one dequantization is shared by all of them, so the float product wins. The row counts
where the two cross are measured (`benchmarks/cpu_matmul.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from powertrain.kernels.fused import silu_mul
from powertrain.kernels.gpu.tuned_table import measured
from powertrain.kernels.gpu_provider import invariant_provider, refuse_gaps, triton_provider
from powertrain.kernels.op import Op, Provider

MAX_PACKED_ROWS = 64
MAX_SKINNY_ROWS = 64


def can_block_dense() -> bool:
    """Whether torch carries oneDNN and its product with a weight reordered once."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def block_dense(weight: torch.Tensor) -> torch.Tensor:
    """A float32 matrix [out, in] in oneDNN's layout for this processor; `to_dense` gives it back."""
    blocked: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return blocked


def blocked_linear(x: torch.Tensor, blocked: torch.Tensor) -> torch.Tensor:
    """x float32 [rows, in] times the transposed matrix behind `blocked`."""
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), blocked, None, "none", [], "")
    return out


def _int8_linear(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [rows, in] times (values * scale)^T; values int8 [out, in], scale [out]. Returns [rows, out] in x's dtype."""
    return x @ (values.to(x.dtype) * scale.to(x.dtype).unsqueeze(1)).t()


def _int8_linear_torch(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # torch's kernel is fast with bfloat16 activations only
    return torch._weight_int8pack_mm(x.to(torch.bfloat16), values, scale.to(torch.bfloat16)).to(x.dtype)


def _accepts_int8(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> str | None:
    if x.device.type != "cpu":
        return "torch's int8 kernel runs on a CPU"
    if values.shape[1] % 32 or values.shape[0] % 4:
        return f"torch's int8 kernel reads whole vectors: {list(values.shape)} is no multiple of 4 rows by 32"
    if x.shape[0] > MAX_PACKED_ROWS:
        return f"{x.shape[0]} rows: dequantizing once is faster above {MAX_PACKED_ROWS}"
    return None


def _int4_linear(
    x: torch.Tensor, packed: torch.Tensor, nibbles: torch.Tensor, scale_and_zero: torch.Tensor, group_size: int
) -> torch.Tensor:
    """x [rows, in] times a 4-bit matrix, `w = (u - 8) * scale + zero` per group of inputs.

    nibbles: uint8 [out, in / 2], the even input in the low half, u in 0..15; scale_and_zero: bfloat16 [groups, out, 2].
    `packed` is the same matrix in the layout of torch's kernel, or empty where that kernel does not run.
    Returns [rows, out] in x's dtype.
    """
    return x @ dequantize_int4(nibbles, scale_and_zero, x.dtype).t()


def dequantize_int4(nibbles: torch.Tensor, scale_and_zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] behind `nibbles` and `scale_and_zero` (see `_int4_linear`), in `dtype`."""
    groups, out_features, _ = scale_and_zero.shape
    unsigned = torch.stack((nibbles & 15, nibbles >> 4), dim=-1)
    scale, zero = (part.t().unsqueeze(-1).to(dtype) for part in scale_and_zero.unbind(-1))
    weight = unsigned.view(out_features, groups, -1).to(dtype).sub_(8).mul_(scale).add_(zero)
    return weight.view(out_features, -1)


def _int4_linear_torch(
    x: torch.Tensor, packed: torch.Tensor, nibbles: torch.Tensor, scale_and_zero: torch.Tensor, group_size: int
) -> torch.Tensor:
    narrow = x.to(torch.bfloat16)
    return torch._weight_int4pack_mm_for_cpu(narrow, packed, group_size, scale_and_zero).to(x.dtype)


def _accepts_int4(
    x: torch.Tensor, packed: torch.Tensor, nibbles: torch.Tensor, scale_and_zero: torch.Tensor, group_size: int
) -> str | None:
    if x.device.type != "cpu" or packed.numel() == 0:
        return "torch's int4 kernel is used on a CPU, with groups of 32, 64, 128 or 256 inputs"
    if x.shape[0] > MAX_PACKED_ROWS:
        return f"{x.shape[0]} rows: dequantizing once is faster above {MAX_PACKED_ROWS}"
    return None


def _dense_linear(x: torch.Tensor, weight: torch.Tensor, keeps_pieces: bool = False) -> torch.Tensor:
    """x [rows, in] times the transposed weight [out, in] of the same dtype.

    `keeps_pieces`: a provider may leave the sum of several float32 [pieces, rows, out] to who uses the result.
    """
    return torch.nn.functional.linear(x, weight)


def _gated_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [rows, in], the weight [2 f, in] holding gate above up. Returns [rows, f]."""
    return silu_mul(torch.nn.functional.linear(x, weight))


def _refuse_many_rows(x: torch.Tensor, weight: torch.Tensor, keeps_pieces: bool = False) -> str | None:
    num_rows, in_features = x.shape
    if num_rows > MAX_SKINNY_ROWS and (
        x.dtype != torch.bfloat16
        or measured("tile bfloat16", x.device, weight.shape[0], in_features, num_rows, False) is None
    ):
        return f"{num_rows} rows: above {MAX_SKINNY_ROWS} the library's product is faster, or nothing was measured"
    return refuse_gaps(x, weight)


def _skinny(function: str) -> Provider[Any, torch.Tensor]:
    return triton_provider("matmul", function, _refuse_many_rows)


dense_linear = Op(
    "dense_linear", _dense_linear, (_skinny("dense_linear"), invariant_provider("dense_linear", refuse_gaps))
)
gated_linear = Op(
    "gated_linear", _gated_linear, (_skinny("gated_linear"), invariant_provider("gated_linear", refuse_gaps))
)
int8_linear = Op(
    "int8_linear",
    _int8_linear,
    (
        Provider("torch", _int8_linear_torch, _accepts_int8),
        triton_provider("quantized", "int8_linear", refuse_gaps),
        invariant_provider("int8_linear", refuse_gaps),
    ),
)
int4_linear = Op("int4_linear", _int4_linear, (Provider("torch", _int4_linear_torch, _accepts_int4),))
