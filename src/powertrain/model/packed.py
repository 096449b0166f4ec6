"""Matrices as the native kernels read them: one stream of bytes in panels of 16 outputs, and the functions around it.

A stream is its panels in output order; missing outputs of the last panel are zeros. A panel of floats is [inputs][16]
elements. A panel of integers is its groups in input order, each a header (16 scales, then 16 minima if it has any) and
blocks of 32 inputs (the last one padded). A block of 4 bits is 256 bytes: byte (j * 16 + c) * 4 + i holds output c,
input 4j + i in its low half and input 16 + 4j + i in its high half. A block of 8 bits is 512 bytes: byte
(j * 16 + c) * 4 + i is output c, input 4j + i. So 16 outputs times 4 inputs are always one 64-byte vector.
A weight is code * scale + minimum; without minima 4 bits mean (code - 8) * scale and 8 bits code * scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from powertrain.model.weights import IntWeight

PANEL = 16
"""Outputs that are read together."""

BLOCK = 32
"""Inputs whose codes lie together; a group of one scale is a whole number of blocks."""

Kind = Literal["u4", "s8", "f32", "f16", "bf16"]
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCK_BYTES = {"u4": PANEL * BLOCK // 2, "s8": PANEL * BLOCK}
MAX_FEATURES = 1 << 24


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """What the bytes of a stream mean. `group_blocks` is the group size in blocks of 32 inputs, 0 for floats.

    `scale` is the type of scales and minima. A gate_up matrix holds two of out_features / 2 outputs, their panels taken
    in turns. `quantizes_activations`: the product rounds its input to 8 bits per block of 32, as the format's own
    runtime does. Raises `ValueError` for a combination that means nothing.
    """

    kind: Kind
    out_features: int
    in_features: int
    group_blocks: int = 0
    scale: Literal["f16", "f32"] = "f16"
    has_minimum: bool = False
    is_gate_up: bool = False
    quantizes_activations: bool = False

    def __post_init__(self) -> None:
        sizes = (self.out_features, self.in_features, self.group_blocks)
        if any(type(size) is not int for size in sizes) or not all(0 < size <= MAX_FEATURES for size in sizes[:2]):
            raise ValueError(f"impossible sizes {sizes}")
        if (self.kind not in FLOATS and self.kind not in BLOCK_BYTES) or self.scale not in ("f16", "f32"):
            raise ValueError(f"unknown kind {self.kind!r} or scale {self.scale!r}")
        if self.is_gate_up and self.out_features % 2:
            raise ValueError(f"gate and up cannot have {self.out_features} outputs together")
        if self.kind in FLOATS and (self.group_blocks or self.has_minimum or self.quantizes_activations):
            raise ValueError("floats have neither groups nor minima nor quantized activations")
        if self.kind in BLOCK_BYTES and (self.group_blocks < 1 or self.num_blocks % self.group_blocks):
            raise ValueError(f"groups of {self.group_blocks} blocks do not divide {self.num_blocks}")

    @property
    def name(self) -> str:
        """The format's name: GGUF's where it is one of theirs, else bits and group size (`int4 g64`), or the dtype."""
        if self.kind in FLOATS:
            return str(FLOATS[self.kind]).removeprefix("torch.")
        if self.group_blocks == 1 and self.scale == "f16" and self.quantizes_activations:
            if self.kind == "u4":
                return "q4_1" if self.has_minimum else "q4_0"
            if not self.has_minimum:
                return "q8_0"
        group = "" if self.group_blocks == self.num_blocks else f" g{self.group_blocks * BLOCK}"
        return f"int{self.kind[1:]}{group}" + (" a8" if self.quantizes_activations else "")

    @property
    def num_blocks(self) -> int:
        return -(-self.in_features // BLOCK)

    @property
    def num_panels(self) -> int:
        return 2 * -(-self.out_features // (2 * PANEL)) if self.is_gate_up else -(-self.out_features // PANEL)

    @property
    def header_bytes(self) -> int:
        """Bytes of one group's scales and minima."""
        return PANEL * (2 if self.scale == "f16" else 4) * (2 if self.has_minimum else 1)

    @property
    def panel_bytes(self) -> int:
        if self.kind in FLOATS:
            return self.in_features * PANEL * FLOATS[self.kind].itemsize
        return self.num_blocks // self.group_blocks * self.header_bytes + self.num_blocks * BLOCK_BYTES[self.kind]

    @property
    def num_bytes(self) -> int:
        """Length of the stream."""
        return self.num_panels * self.panel_bytes


class Grid(NamedTuple):
    """Quantized rows before they go into panels.

    codes: uint8 [out, blocks, 16] with input i of a block in the low half of byte i and input 16 + i in the high half
    (u4), or the bytes of int8 [out, blocks, 32] (s8); scale and minimum: float16 or float32 [out, groups].
    """

    kind: Literal["u4", "s8"]
    in_features: int
    codes: Tensor
    scale: Tensor
    minimum: Tensor | None
    quantizes_activations: bool


Part: TypeAlias = Grid | Tensor
"""A matrix about to be packed: quantized rows, or float32, float16 or bfloat16 [out, in]."""

GGUF_GRIDS: dict[str, tuple[Literal["u4", "s8"], int, bool]] = {
    "Q4_0": ("u4", 18, False),
    "Q4_1": ("u4", 20, True),
    "Q8_0": ("s8", 34, False),
}
"""GGUF type that runs as stored -> (kind, bytes per block, whether a float16 minimum follows the scale)."""

GGUF_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_part(type_name: str, rows: npt.NDArray[np.uint8]) -> Part:
    """Blocks as GGUF stores them, uint8 [rows, bytes per row], of a type in `GGUF_GRIDS` or `GGUF_FLOATS`.

    Their products quantize activations, as llama.cpp's do.
    """
    raw = torch.from_numpy(rows)
    if type_name in GGUF_FLOATS:
        return raw.contiguous().view(GGUF_FLOATS[type_name])
    kind, block_bytes, has_minimum = GGUF_GRIDS[type_name]
    blocks = raw.view(len(rows), -1, block_bytes)
    num_halves = 2 if has_minimum else 1
    halves = blocks[:, :, : 2 * num_halves].contiguous().view(torch.float16)
    minimum = halves[:, :, 1] if has_minimum else None
    return Grid(kind, blocks.shape[1] * BLOCK, blocks[:, :, 2 * num_halves :], halves[:, :, 0], minimum, True)


def int_part(weight: IntWeight, quantizes_activations: bool = False) -> Part:
    """Integers of 2 to 8 bits, in the codes of 4 bits if they fit and else of 8, so a stream is as long as theirs.

    Groups that are no whole blocks become float32. Scales and minima are kept in float16 where that loses nothing,
    else in float32.
    """
    out_features, in_features = weight.values.shape
    num_groups = weight.scale.shape[1]
    if num_groups > 1 and in_features // num_groups % BLOCK:
        return weight.dequantize()
    weight = weight.widened()
    values = torch.nn.functional.pad(weight.values, (0, -in_features % BLOCK)).view(out_features, -1, BLOCK)
    lowest = 0
    codes = values.view(torch.uint8)
    if weight.num_bits == 4:
        lowest = -8
        unsigned = (values + 8).view(torch.uint8)
        codes = unsigned[:, :, :16] | (unsigned[:, :, 16:] << 4)
    scale = weight.scale.float()
    minimum = None if weight.zero_point is None else (lowest - weight.zero_point.float()) * scale
    if _is_half(scale) and (minimum is None or _is_half(minimum)):
        scale, minimum = scale.half(), None if minimum is None else minimum.half()
    return Grid("u4" if weight.num_bits == 4 else "s8", in_features, codes, scale, minimum, quantizes_activations)


def _is_half(values: Tensor) -> bool:
    return torch.equal(values.half().float(), values)


def can_stack(parts: Sequence[Part]) -> bool:
    """Whether `pack` can make one stream of them: same inputs, same grid or dtype."""
    return len({_grid_of(part) for part in parts}) == 1


def _grid_of(part: Part) -> tuple[object, ...]:
    if isinstance(part, Tensor):
        return part.dtype, part.shape[1]
    return part.kind, part.in_features, part.scale.shape[1], part.minimum is None, part.quantizes_activations


def pack(parts: Sequence[Part], is_gate_up: bool = False) -> tuple[Tensor, PackedLayout]:
    """The stream, uint8 [bytes], of matrices stacked along their outputs, and its layout.

    `is_gate_up` takes exactly two of the same shape and interleaves their panels. Raises `ValueError` for matrices that
    cannot be one stream (see `can_stack`).
    """
    if not can_stack(parts):
        raise ValueError("matrices of different grids cannot be one stream")
    if not is_gate_up:
        whole = _stack(parts)
        return _panels(whole).flatten(), _layout(whole)
    gate, up = _same_scales(parts)
    layout = _layout(gate)
    if _layout(up) != layout:
        raise ValueError("gate and up differ in their outputs")
    stream = torch.stack((_panels(gate), _panels(up)), dim=1).flatten()
    return stream, replace(layout, out_features=2 * layout.out_features, is_gate_up=True)


def _stack(parts: Sequence[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    same = _same_scales(parts)
    grids = [part for part in same if not isinstance(part, Tensor)]
    if not grids:
        return torch.cat([part for part in same if isinstance(part, Tensor)])
    minima = [grid.minimum for grid in grids if grid.minimum is not None]
    return grids[0]._replace(
        codes=torch.cat([grid.codes for grid in grids]),
        scale=torch.cat([grid.scale for grid in grids]),
        minimum=torch.cat(minima) if minima else None,
    )


def _same_scales(parts: Sequence[Part]) -> list[Part]:
    """All scales as float32 if those of one part are."""
    is_half = all(isinstance(part, Tensor) or part.scale.dtype == torch.float16 for part in parts)
    return [part if is_half or isinstance(part, Tensor) else _with_float_scales(part) for part in parts]


def _with_float_scales(grid: Grid) -> Grid:
    return grid._replace(scale=grid.scale.float(), minimum=None if grid.minimum is None else grid.minimum.float())


def _layout(part: Part) -> PackedLayout:
    if isinstance(part, Tensor):
        kind: Kind = "f32" if part.dtype == torch.float32 else "f16" if part.dtype == torch.float16 else "bf16"
        return PackedLayout(kind, part.shape[0], part.shape[1])
    return PackedLayout(
        part.kind,
        part.codes.shape[0],
        part.in_features,
        group_blocks=part.codes.shape[1] // part.scale.shape[1],
        scale="f16" if part.scale.dtype == torch.float16 else "f32",
        has_minimum=part.minimum is not None,
        quantizes_activations=part.quantizes_activations,
    )


def _panels(part: Part) -> Tensor:
    """uint8 [panels, bytes per panel]."""
    layout = _layout(part)
    if isinstance(part, Tensor):
        rows = _pad_rows(part).view(-1, PANEL, layout.in_features)
        return rows.transpose(1, 2).contiguous().view(layout.num_panels, -1).view(torch.uint8)
    num_groups = part.scale.shape[1]
    head = layout.header_bytes
    panels = torch.empty(layout.num_panels, num_groups, layout.panel_bytes // num_groups, dtype=torch.uint8)
    values = torch.stack([part.scale] if part.minimum is None else [part.scale, part.minimum], dim=1)
    headers = _pad_rows(values).view(-1, PANEL, values.shape[1], num_groups).permute(0, 3, 2, 1).contiguous()
    panels[:, :, :head] = headers.view(torch.uint8).flatten(2)
    words = _pad_rows(part.codes).contiguous().view(torch.int32)  # the four inputs that stay together
    words = words.view(-1, PANEL, num_groups, layout.group_blocks, words.shape[-1])
    body = panels[:, :, head:].view(torch.int32)
    body.view(*body.shape[:2], layout.group_blocks, -1, PANEL).copy_(words.permute(0, 2, 3, 4, 1))
    return panels.flatten(1)


def _pad_rows(rows: Tensor) -> Tensor:
    """rows [out, ...] with zeros below up to whole panels."""
    missing = -rows.shape[0] % PANEL
    return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows


def unpack(stream: Tensor, layout: PackedLayout) -> Tensor:
    """The matrix float32 [out, in] behind a stream: one product and one sum per weight, each rounded to float32."""
    panels = stream[: layout.num_bytes].view(layout.num_panels, layout.panel_bytes)
    if not layout.is_gate_up:
        return _rows(panels, layout)
    half = replace(layout, out_features=layout.out_features // 2, is_gate_up=False)
    return torch.cat([_rows(panels[start::2].contiguous(), half) for start in (0, 1)])


def _rows(panels: Tensor, layout: PackedLayout) -> Tensor:
    if layout.kind in FLOATS:
        columns = panels.view(FLOATS[layout.kind]).view(-1, layout.in_features, PANEL).float()
        return columns.transpose(1, 2).flatten(0, 1)[: layout.out_features].contiguous()
    num_groups = layout.num_blocks // layout.group_blocks
    groups = panels.view(len(panels), num_groups, -1)
    header = groups[:, :, : layout.header_bytes].contiguous().view(FLOATS[layout.scale]).float()
    header = header.view(len(panels), num_groups, -1, PANEL, 1).transpose(2, 3)  # [panels, groups, 16, 1 or 2, 1]
    codes = groups[:, :, layout.header_bytes :]
    codes = codes.view(*codes.shape[:2], layout.group_blocks, -1, PANEL, 4)
    codes = codes.permute(0, 1, 4, 2, 3, 5).flatten(4)  # [panels, groups, 16, blocks, bytes]
    if layout.kind == "u4":
        values = torch.cat((codes & 15, codes >> 4), dim=-1).float()
        values = values if layout.has_minimum else values.sub_(8)
    else:
        values = codes.contiguous().view(torch.int8).float()
    weights = values.flatten(3).mul_(header[:, :, :, 0])
    weights = weights.add_(header[:, :, :, 1]) if layout.has_minimum else weights
    rows = weights.transpose(1, 2).reshape(len(panels) * PANEL, -1)
    return rows[: layout.out_features, : layout.in_features].contiguous()


def native_matrix(stream: Tensor, layout: PackedLayout, native: ModuleType) -> Any:
    """The native module's own object over a stream, whose bytes it keeps alive."""
    return native.Matrix(
        stream,
        layout.kind,
        layout.out_features,
        layout.in_features,
        group_blocks=layout.group_blocks,
        scale=layout.scale,
        has_minimum=layout.has_minimum,
        is_gate_up=layout.is_gate_up,
        quantizes_activations=layout.quantizes_activations,
    )


class PackedMatrix:
    """A stream and its layout as a weight format, multiplied by the native kernels.

    `matrix` is the native module's own object over the same bytes, `layout` and `stream` (uint8 [bytes]) what it was
    made of. Inputs of other dtypes than float32 are converted, and so is the product back.
    """

    def __init__(self, stream: Tensor, layout: PackedLayout, native: ModuleType, team: Any) -> None:
        """native: the module `powertrain.kernels.native.load()` gives; team: its thread pool."""
        if stream.dtype != torch.uint8 or stream.shape != (layout.num_bytes,):
            raise ValueError(f"a stream of {layout.num_bytes} bytes is expected, got {list(stream.shape)}")
        self.stream, self.layout = stream, layout
        self.name, self.out_features = layout.name, layout.out_features
        self.matrix = native_matrix(stream, layout, native)
        self._native, self._team = native, team

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out], in x's dtype."""
        out = torch.empty(x.shape[0], self.out_features, dtype=torch.float32)
        self._native.matmul(self._team, self.matrix, x.to(torch.float32).contiguous(), out)
        return out.to(x.dtype)

    def copy(self) -> PackedMatrix:
        """The same matrix over bytes of its own."""
        return PackedMatrix(self.stream.clone(), self.layout, self._native, self._team)

    def unpack(self) -> Tensor:
        return unpack(self.stream, self.layout)

    def step_bytes(self) -> int:
        return self.nbytes()

    def nbytes(self) -> int:
        return self.stream.numel()
