"""Weight formats: how a Linear's matrix is stored and multiplied. One small class per dtype and packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from powertrain.kernels.matmul import (
    block_dense,
    blocked_linear,
    can_block_dense,
    dense_linear,
    dequantize_int4,
    gated_linear,
    int4_linear,
    int8_linear,
)
from powertrain.kernels.quantized import int8_rounded_linear, rounded_gated_linear, rounded_linear
from powertrain.kernels.rounding import Rounded
from powertrain.model.gpu_weights import Int4Blocked
from powertrain.types import ModelFileError


class IntWeight(NamedTuple):
    """An integer-quantized matrix before packing: `weight = (values - zero_point) * scale` per group of inputs.

    values: int8 [out, in], each in [-2^(b-1), 2^(b-1) - 1]; scale: float [out, groups];
    zero_point: int8 [out, groups] on the same range, or None when symmetric. groups = in / group_size, 1 per channel.
    input_order: int64 [in] where the columns were sorted before they were grouped (GPTQ's activation order): column i
    multiplies input `input_order[i]`; None where they stand in their own order.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    num_bits: int
    input_order: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] these integers stand for, computed in float32 and rounded once to `dtype`."""
        out_features, in_features = self.values.shape
        groups = self.scale.shape[1]
        values = self.values.to(torch.float32).view(out_features, groups, in_features // groups)
        if self.zero_point is not None:
            values = values - self.zero_point.to(torch.float32).unsqueeze(-1)
        weight = (values * self.scale.to(torch.float32).unsqueeze(-1)).view(out_features, in_features).to(dtype)
        return weight if self.input_order is None else weight[:, self.input_order.argsort()]

    def widened(self) -> IntWeight:
        """The same integers counted as 4 bits (if 2 or 3) or 8 (if 5 to 7), the widths that products are written for.

        So they run as fast as those and read as much memory: fewer bits make a smaller file, not a smaller step.
        """
        return self._replace(num_bits=4 if self.num_bits <= 4 else 8)


class WeightFormat(Protocol):
    """A stored matrix [out, in]: knows its bytes and multiplies activations [rows, in] into [rows, out]."""

    name: str
    out_features: int

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] times the transposed matrix, in x's dtype."""
        ...

    def unpack(self) -> torch.Tensor:
        """The matrix [out, in] in float32 (or the dense dtype), as `matmul` means it."""
        ...

    def step_bytes(self) -> int:
        """Bytes a product with few rows has to read."""
        ...

    def nbytes(self) -> int:
        """Bytes held in memory."""
        ...


@runtime_checkable
class GatedFormat(Protocol):
    """A format that can multiply and gate in one."""

    def gated_matmul(self, x: torch.Tensor) -> torch.Tensor | None:
        """silu(gate) * up [rows, out / 2], with gate above up, where that is one product; else None."""
        ...


@runtime_checkable
class PiecewiseFormat(Protocol):
    """A format whose product may be left in pieces."""

    def matmul_in_pieces(self, x: torch.Tensor) -> torch.Tensor:
        """As `matmul`, or float32 [pieces, rows, out] whose sum that is."""
        ...


@runtime_checkable
class RoundedFormat(Protocol):
    """A format that may multiply activations rounded to 8 bits."""

    def rounded_dtype(self) -> torch.dtype | None:
        """The type it wants them in, where many rows are multiplied on its device; None for floats."""
        ...

    def matmul_rounded(self, x: Rounded, keeps_pieces: bool = False) -> torch.Tensor:
        """x [rows, in] of `rounded_dtype` times the transposed matrix, in the type x stands for.

        `keeps_pieces`: or float32 [pieces, rows, out] whose sum that is.
        """
        ...

    def gated_rounded(self, x: Rounded, to: torch.dtype) -> Rounded:
        """silu(gate) * up of the product, with gate above up, rounded `to` 8 bits."""
        ...


class Dense:
    """A float matrix. On a CPU float32 is kept in oneDNN's blocked layout, other types input-major.

    The blocked layout is as fast as input-major at one row and about twice as fast at 4 to 64 (both read the same
    bytes; `benchmarks/cpu_matmul.py`); output-major, as checkpoints store it, is slower than either.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: [out, in], already on its device and in its dtype."""
        self.name = str(weight.dtype).removeprefix("torch.")
        self.out_features = weight.shape[0]
        self._nbytes = weight.numel() * weight.element_size()
        self._blocked: torch.Tensor | None = None
        self._weight: torch.Tensor | None = weight
        if weight.device.type == "cpu":
            is_blocked = weight.dtype == torch.float32 and can_block_dense()
            self._blocked = block_dense(weight) if is_blocked else None
            self._weight = None if is_blocked else weight.t().contiguous()

    @classmethod
    def pack(cls, weight: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Dense:
        return cls(weight.to(device=device, dtype=dtype))

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        if self._blocked is not None:
            return blocked_linear(x, self._blocked)
        assert self._weight is not None
        return x @ self._weight if x.device.type == "cpu" else dense_linear(x, self._weight)

    def matmul_in_pieces(self, x: torch.Tensor) -> torch.Tensor:
        """As `matmul`, or float32 [pieces, rows, out] whose sum that is."""
        if self._weight is None or x.device.type == "cpu":
            return self.matmul(x)
        return dense_linear(x, self._weight, True)

    def gated_matmul(self, x: torch.Tensor) -> torch.Tensor | None:
        """silu(gate) * up [rows, out / 2] where that is one product, with gate above up; else None."""
        if self._weight is None or x.device.type == "cpu":
            return None
        return gated_linear(x, self._weight)

    def unpack(self) -> torch.Tensor:
        if self._blocked is not None:
            return self._blocked.to_dense()
        assert self._weight is not None
        return self._weight.t() if self._weight.device.type == "cpu" else self._weight

    def is_held_by(self, tensor: torch.Tensor) -> bool:
        """Whether this matrix is `tensor` itself, so that its bytes count once."""
        return self._weight is tensor

    def step_bytes(self) -> int:
        return self._nbytes

    def nbytes(self) -> int:
        return self._nbytes


class Int8Channel:
    """Integers of up to 8 bits, each in a byte, with one scale per output: W8A16.

    A zero point becomes one column: -zero * scale * sum(x).
    """

    name = "int8"

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> None:
        self._values, self._scale, self._offset = values, scale, offset
        self.out_features = values.shape[0]

    @classmethod
    def pack(cls, weight: IntWeight, device: torch.device) -> Int8Channel:
        scale = weight.scale[:, 0].float()
        offset = None if weight.zero_point is None else (-weight.zero_point[:, 0].float() * scale).to(device)
        return cls(weight.values.to(device), scale.to(device), offset)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        product = int8_linear(x, self._values, self._scale)
        if self._offset is None:
            return product
        return product + x.sum(-1, keepdim=True) * self._offset.to(x.dtype)

    def multiplies_integers(self) -> bool:
        """Whether `rounding_matmul` and `matmul_rounded` are there: on a GPU, without zero points."""
        return self._offset is None and self._values.device.type != "cpu"

    def rounding_matmul(self, x: torch.Tensor) -> torch.Tensor:
        """The product of x with each row rounded to 8 bits."""
        return int8_rounded_linear(x, self._values, self._scale)

    def matmul_rounded(self, x: Rounded, keeps_pieces: bool = False) -> torch.Tensor:
        """The product of rows that are integers already."""
        return rounded_linear(x.values, x.scale, self._values, self._scale, x.dtype, keeps_pieces)

    def gated_rounded(self, x: Rounded, to: torch.dtype) -> Rounded:
        """The product of rows that are integers already, gated and rounded."""
        return Rounded(*rounded_gated_linear(x.values, x.scale, self._values, self._scale, x.dtype, to), x.dtype)

    def unpack(self) -> torch.Tensor:
        weight = self._values.float() * self._scale.unsqueeze(1)
        return weight if self._offset is None else weight + self._offset.unsqueeze(1)

    def step_bytes(self) -> int:
        return self.nbytes()

    def nbytes(self) -> int:
        return self._values.numel() + self.out_features * 4 * (1 if self._offset is None else 2)


class Int4Group:
    """Integers of up to 4 bits, each in a nibble, with a scale (and a zero) per group of inputs: W4A16 and below.

    Holds the nibbles for the dequantized product and, on a CPU with a group size it knows, the same nibbles in the
    layout of torch's kernel; a product reads one of the two.
    """

    name = "int4"

    def __init__(self, nibbles: torch.Tensor, packed: torch.Tensor, scale_and_zero: torch.Tensor) -> None:
        self._nibbles, self._packed, self._scale_and_zero = nibbles, packed, scale_and_zero
        self.out_features = nibbles.shape[0]
        self._group_size = nibbles.shape[1] * 2 // scale_and_zero.shape[0]

    @classmethod
    def pack(cls, weight: IntWeight, device: torch.device) -> Int4Group:
        unsigned = (weight.values.to(torch.int32) + 8).to(torch.uint8)
        nibbles = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
        scale = weight.scale.float()
        zero = torch.zeros_like(scale) if weight.zero_point is None else -weight.zero_point.float() * scale
        scale_and_zero = torch.stack((scale, zero), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()
        out_features, in_features = weight.values.shape
        group_size = in_features // scale.shape[1]
        packed = torch.empty(0, dtype=torch.uint8)
        if device.type == "cpu" and group_size in (32, 64, 128, 256) and out_features % 16 == 0:
            packed = torch._convert_weight_to_int4pack_for_cpu(unsigned.to(torch.int32), 1)
        return cls(nibbles.to(device), packed, scale_and_zero.to(device))

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return int4_linear(x, self._packed, self._nibbles, self._scale_and_zero, self._group_size)

    def unpack(self) -> torch.Tensor:
        return dequantize_int4(self._nibbles, self._scale_and_zero, torch.float32)

    def step_bytes(self) -> int:
        return self._nibbles.numel() + self._scale_and_zero.numel() * 2

    def nbytes(self) -> int:
        return self.step_bytes() + self._packed.numel() * self._packed.element_size()


class Int8Group:
    """Integers of up to 8 bits with a scale (and a zero) per group of inputs. Dequantized for each product."""

    name = "int8 group"

    def __init__(self, weight: IntWeight) -> None:
        """weight: on its device already."""
        self._weight = weight
        self.out_features = weight.values.shape[0]

    @classmethod
    def pack(cls, weight: IntWeight, device: torch.device) -> Int8Group:
        zero_point = None if weight.zero_point is None else weight.zero_point.to(device)
        return cls(IntWeight(weight.values.to(device), weight.scale.float().to(device), zero_point, 8))

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self._weight.dequantize(x.dtype).t()

    def unpack(self) -> torch.Tensor:
        return self._weight.dequantize()

    def step_bytes(self) -> int:
        return self.nbytes()

    def nbytes(self) -> int:
        zero_point = self._weight.zero_point
        return self._weight.values.nbytes + self._weight.scale.nbytes + (0 if zero_point is None else zero_point.nbytes)


def pack_int_weight(weight: IntWeight, device: torch.device) -> WeightFormat:
    """The running format for quantized integers, which stay quantized. Its columns stand as in `weight.values`.

    2 and 3 bits run as 4, 5 to 7 as 8: `nbytes` and `step_bytes` of the format are those of the wider one, which is
    what a step reads. Other grids (up to 4 bits over odd rows) raise `ModelFileError`: dequantizing them at load would
    be slower and larger than what the user thinks is running.
    """
    kind = f"{weight.num_bits} bits, {weight.scale.shape[1]} groups a row" + (
        "" if weight.zero_point is None else ", asymmetric"
    )
    weight = weight.widened()
    if weight.num_bits == 8:
        return Int8Channel.pack(weight, device) if weight.scale.shape[1] == 1 else Int8Group.pack(weight, device)
    if weight.values.shape[1] % 2 == 0:
        blocked = Int4Blocked.pack(weight, device) if device.type == "cuda" else None
        return blocked or Int4Group.pack(weight, device)
    raise ModelFileError(f"no running format for {kind}; use 8 bits, or 4 bits over even rows")


def concat_int_weights(weights: Sequence[IntWeight]) -> IntWeight:
    """Stack matrices with the same inputs, input order and grid along their outputs (q, k, v as one product)."""
    has_zero = weights[0].zero_point is not None
    return IntWeight(
        torch.cat([w.values for w in weights]),
        torch.cat([w.scale for w in weights]),
        torch.cat([w.zero_point for w in weights if w.zero_point is not None]) if has_zero else None,
        weights[0].num_bits,
        weights[0].input_order,
    )
