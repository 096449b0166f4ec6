"""Integers that were rounded elsewhere, moved into GGUF's blocks as they are: nothing is rounded a second time.

A block of 32 weights has one float16 scale (and minimum), so that any group of whole blocks fits: the scale is written
once for each. Fewer bits than a type has lie in the middle of its range.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from powertrain.checkpoint.gguf_encode import half_bytes, pack_fifth_bits, pack_nibbles
from powertrain.model.weights import IntWeight

BLOCK = 32
LARGEST_SCALE_ERROR = 2.0**-10
"""Relative: float16 changes a number of its normal range by less. Scales beyond that range have no blocks."""

MIDDLES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}
"""The code of zero in the types without a minimum."""


def type_of_integers(weight: IntWeight) -> str | None:
    """The type whose blocks hold these integers, with scales and minima in float16; None if there is none.

    Groups must be whole blocks of 32 in the columns' own order; `half_error` says what the float16 changes.
    """
    columns = weight.values.shape[1]
    if weight.input_order is not None or columns // weight.scale.shape[1] % BLOCK:
        return None
    if weight.zero_point is None:
        name = "Q4_0" if weight.num_bits <= 4 else "Q5_0" if weight.num_bits == 5 else "Q8_0"
    elif weight.num_bits <= 5:
        name = "Q4_1" if weight.num_bits <= 4 else "Q5_1"
    else:
        return None
    return name if half_error(weight) <= LARGEST_SCALE_ERROR else None


def half_error(weight: IntWeight) -> float:
    """The largest relative change of a scale or minimum that is stored as float16; 0 if all of them fit exactly."""
    scale = weight.scale.float()
    numbers = [scale] if weight.zero_point is None else [scale, scale * _codes_of_zero(weight)]
    errors = [_relative_error(number.half().float(), number) for number in numbers]
    return max(float(error.max()) for error in errors)


def _relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    error = torch.where(found == wanted, 0.0, (found - wanted).abs() / wanted.abs())
    return error.nan_to_num(nan=torch.inf)


def encode_integers(type_name: str, weight: IntWeight) -> npt.NDArray[np.uint8]:
    """The integers of `weight` as blocks of the type that `type_of_integers` names, uint8 [rows, bytes per row]."""
    rows, columns = weight.values.shape
    blocks_per_group = columns // weight.scale.shape[1] // BLOCK

    def for_each_block(number: Tensor) -> Tensor:
        return half_bytes(number.repeat_interleave(blocks_per_group, dim=1).view(-1, 1))

    scale = weight.scale.float()
    head, middle = [for_each_block(scale)], MIDDLES.get(type_name)
    if middle is None:
        head.append(for_each_block(-scale * _codes_of_zero(weight)))
        middle = 1 << (weight.num_bits - 1)
    codes = (weight.values.view(-1, BLOCK).to(torch.int16) + middle).to(torch.uint8)
    if type_name in ("Q5_0", "Q5_1"):
        head.append(pack_fifth_bits(codes))
    packed = codes if type_name == "Q8_0" else pack_nibbles(codes & 15)
    blocks: npt.NDArray[np.uint8] = torch.cat((*head, packed), dim=1).view(rows, -1).numpy()
    return blocks


def _codes_of_zero(weight: IntWeight) -> Tensor:
    """The code, counted from 0, that stands for zero in each group: float32 [rows, groups]."""
    assert weight.zero_point is not None
    return weight.zero_point.float() + (1 << (weight.num_bits - 1))
