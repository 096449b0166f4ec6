"""GPTQ checkpoints: integers packed into int32 words along the inputs, by AutoGPTQ, GPTQModel and their kin.

`qweight` int32 [in * b / 32, out]: input k of a column lies at bit k * b, low end first, so 3 bits straddle words.
`scales` float [groups, out]. `qzeros` int32 [groups, out * b / 32], packed along the outputs; checkpoint_format "gptq"
stores a zero minus one, "gptq_v2" the zero itself. `g_idx` int32 [in]: the group of each input, which activation order
(`desc_act`) scatters.
A weight is `(q - zero) * scale`, all of them unsigned.
Format: https://github.com/ModelCloud/GPTQModel, method: Frantar et al. 2022, arXiv 2210.17323
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from powertrain.checkpoint.compressed_tensors import num_words, pack_int32, unpack_int32
from powertrain.checkpoint.quantization_config import (
    HEAD,
    flag_of,
    group_size_of,
    num_groups,
    refuse,
    refuse_overrides,
)
from powertrain.checkpoint.source import Checkpoint, load_checked
from powertrain.model.weights import IntWeight
from powertrain.types import ModelFileError

FORMATS = ("gptq", "gptq_v2")
BITS = (2, 3, 4, 8)
MISPLACED_ONES = (0x24924924, -0x6DB6DB6E, 0x49249249)
"""What GPTQModel before its pull request 2763 subtracted from three words of 3-bit zeros: fours, ones and twos."""


@dataclass(frozen=True, slots=True)
class GPTQScheme:
    """`group_size` None is one group a row. `has_zero_minus_one`: the first of the two formats of `qzeros`."""

    num_bits: int
    group_size: int | None
    has_zero_minus_one: bool
    is_symmetric: bool
    has_act_order: bool


def gptq_scheme_of(quantization: Mapping[str, Any], layer: str) -> GPTQScheme | None:
    """How the Linear `layer` is quantized: as all others are, but for the head, which `lm_head` speaks for.

    Raises `ModelFileError` naming the field of a `quantization_config` that cannot be run.
    """
    refuse_overrides(quantization, "dynamic", "modules_in_block_to_quantize")
    found = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if found not in FORMATS or quantization.get("is_marlin_format"):
        found = "marlin" if quantization.get("is_marlin_format") else found
        refuse(f"checkpoint_format {found!r} cannot be run; {' and '.join(FORMATS)} can")
    if quantization.get("pack_dtype", "int32") != "int32":
        refuse(f"pack_dtype {quantization['pack_dtype']!r} cannot be run; int32 can")
    bits = quantization.get("bits")
    if bits not in BITS or type(bits) is not int:
        refuse(f"bits {bits!r} cannot be run; 2, 3, 4 and 8 can")
    if bits == 3 and found == "gptq" and not flag_of(quantization, "sym", False):
        refuse("sym false with bits 3 cannot be run: writers disagree about its zeros; checkpoint_format 'gptq_v2' can")
    scheme = GPTQScheme(
        num_bits=bits,
        group_size=group_size_of(quantization),
        has_zero_minus_one=found == "gptq",
        is_symmetric=flag_of(quantization, "sym", False),
        has_act_order=flag_of(quantization, "desc_act", False),
    )
    return None if layer == HEAD and not flag_of(quantization, "lm_head", False) else scheme


def load_gptq_weight(checkpoint: Checkpoint, layer: str, scheme: GPTQScheme, shape: tuple[int, int]) -> IntWeight:
    """The integers of one layer of `shape` [out, in]; columns whose groups are scattered come sorted by group.

    Raises `ModelFileError` naming the tensor that is missing or whose dtype, shape or groups do not fit.
    """
    out_features, in_features = shape
    bits, groups = scheme.num_bits, num_groups(layer, in_features, scheme.group_size)
    order = _input_order(checkpoint, layer, scheme, in_features, groups)
    packed_shape = (num_words(in_features, bits), out_features)
    packed = load_checked(checkpoint, f"{layer}.qweight", packed_shape, torch.int32)
    zeros = load_checked(checkpoint, f"{layer}.qzeros", (groups, num_words(out_features, bits)), torch.int32)
    scale = load_checked(checkpoint, f"{layer}.scales", (groups, out_features)).t().contiguous()
    values = unpack_int32(packed.t(), bits, shape)
    values = values if order is None else values.index_select(1, order)
    if bits == 3 and scheme.has_zero_minus_one:
        if not _are_middle_zeros_of_3_bits(zeros, out_features):
            raise ModelFileError(f"{checkpoint.path}: {layer}.qzeros are not all in the middle, as sym says they are")
        return IntWeight(values, scale, None, bits, order)
    return IntWeight(values, scale, _zero_point(zeros, scheme, out_features), bits, order)


def _input_order(
    checkpoint: Checkpoint, layer: str, scheme: GPTQScheme, in_features: int, groups: int
) -> Tensor | None:
    """int64 [in]: the inputs sorted by group, within a group as they come; None if they are sorted as they stand."""
    name = f"{layer}.g_idx"
    if not scheme.has_act_order and name not in checkpoint.names():
        return None
    group_of = load_checked(checkpoint, name, (in_features,), torch.int32).long()
    if int(group_of.min()) < 0 or int(group_of.max()) >= groups:
        raise ModelFileError(f"{checkpoint.path}: {name} names groups beyond the {groups} of a row")
    members = torch.bincount(group_of, minlength=groups)
    if not bool((members == in_features // groups).all()):
        raise ModelFileError(
            f"{checkpoint.path}: {name} has groups of {int(members.min())} to {int(members.max())} inputs, expected "
            f"{in_features // groups} in each; quantize the model again with whole groups"
        )
    order = torch.argsort(group_of, stable=True)
    return None if torch.equal(order, torch.arange(in_features)) else order


def _zero_point(zeros: Tensor, scheme: GPTQScheme, out_features: int) -> Tensor | None:
    """int8 [out, groups] on the range of the values; None if all are in the middle of it."""
    shape = (zeros.shape[0], out_features)
    as_stored = unpack_int32(zeros, scheme.num_bits, shape)
    if scheme.is_symmetric and not as_stored.any():
        return None  # some writers store zeros of the second format under the first one's name; `sym` tells
    if not scheme.has_zero_minus_one:
        return as_stored.t().contiguous() if as_stored.any() else None
    # Added to whole words as GPTQModel subtracts it: a zero of 0 borrows from its neighbour and must give back.
    ones = sum(1 << bit for bit in range(0, 32, scheme.num_bits))
    actual = unpack_int32(zeros + ones, scheme.num_bits, shape)
    return actual.t().contiguous() if actual.any() else None


def _are_middle_zeros_of_3_bits(zeros: Tensor, out_features: int) -> bool:
    """Whether all zeros are 4 in one of the ways it is written: minus one, as it is, or minus `MISPLACED_ONES`."""
    middle = torch.zeros(zeros.shape[0], out_features, dtype=torch.int8)
    ones = torch.tensor(MISPLACED_ONES, dtype=torch.int32).repeat(-(-zeros.shape[1] // 3))[: zeros.shape[1]]
    written = [pack_int32(middle - 1, 3), pack_int32(middle, 3), pack_int32(middle, 3) - ones]
    return any(torch.equal(zeros, words) for words in written)
