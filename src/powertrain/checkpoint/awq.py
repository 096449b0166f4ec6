"""AWQ checkpoints, version "gemm": 4-bit integers packed into int32 words along the outputs, in AutoAWQ's order.

`qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8]: nibble k of a word, counted from the low end, holds
output 0, 2, 4, 6, 1, 3, 5, 7 of its eight. `scales` float [groups, out]. A weight is `(q - zero) * scale`, unsigned.
Format: https://github.com/casper-hansen/AutoAWQ, method: Lin et al. 2023, arXiv 2306.00978
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from powertrain.checkpoint.compressed_tensors import num_words, unpack_int32
from powertrain.checkpoint.quantization_config import (
    HEAD,
    flag_of,
    group_size_of,
    names_of,
    num_groups,
    refuse,
    refuse_overrides,
)
from powertrain.checkpoint.source import Checkpoint, load_checked
from powertrain.model.weights import IntWeight
from powertrain.types import ModelFileError

NUM_BITS = 4
NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
"""The inverse of the order above: where each of a word's eight outputs lies."""


@dataclass(frozen=True, slots=True)
class AWQScheme:
    """`group_size` None is one group a row."""

    group_size: int | None
    has_zero_point: bool


def awq_scheme_of(quantization: Mapping[str, Any], layer: str) -> AWQScheme | None:
    """How the Linear `layer` is quantized; None for the head and for names with an entry of `modules_to_not_convert`.

    An entry excludes every layer whose name contains it, as AutoAWQ has it. Raises `ModelFileError` naming the field
    of a `quantization_config` that cannot be run.
    """
    refuse_overrides(quantization, "dynamic", "modules_in_block_to_quantize")
    version = quantization.get("version") or quantization.get("checkpoint_format") or quantization.get("format")
    if not isinstance(version, str | None) or (version or "gemm").lower() != "gemm":
        refuse(f"version {version!r} of AWQ cannot be run; gemm can")
    if quantization.get("backend") == "llm-awq":
        refuse("backend 'llm-awq' packs weights in another order and cannot be run; autoawq's gemm can")
    bits = quantization.get("bits", NUM_BITS)
    if bits != NUM_BITS or type(bits) is not int:
        refuse(f"bits {bits!r} cannot be run; AWQ of 4 bits can")
    scheme = AWQScheme(group_size_of(quantization), flag_of(quantization, "zero_point", True))
    is_kept = any(name in layer for name in names_of(quantization, "modules_to_not_convert"))
    return None if is_kept or (layer == HEAD and not flag_of(quantization, "lm_head", False)) else scheme


def load_awq_weight(checkpoint: Checkpoint, layer: str, scheme: AWQScheme, shape: tuple[int, int]) -> IntWeight:
    """The integers of one layer of `shape` [out, in].

    Raises `ModelFileError` naming the tensor that is missing or whose dtype or shape does not fit.
    """
    out_features, in_features = shape
    groups, words = num_groups(layer, in_features, scheme.group_size), num_words(out_features, NUM_BITS)
    packed = load_checked(checkpoint, f"{layer}.qweight", (in_features, words), torch.int32)
    scale = load_checked(checkpoint, f"{layer}.scales", (groups, out_features)).t().contiguous()
    zero_point = None
    if scheme.has_zero_point:
        zeros = load_checked(checkpoint, f"{layer}.qzeros", (groups, words), torch.int32)
        zero_point = _unpack(zeros, out_features)
    elif f"{layer}.qzeros" in checkpoint.names():
        raise ModelFileError(
            f"{checkpoint.path}: {layer}.qzeros is there although zero_point is false: set it in config.json's "
            "quantization_config to what the weights were made with"
        )
    is_symmetric = zero_point is None or not zero_point.any()
    return IntWeight(_unpack(packed, out_features), scale, None if is_symmetric else zero_point, NUM_BITS)


def _unpack(packed: Tensor, out_features: int) -> Tensor:
    """int32 [n, words] -> int8 [out, n]."""
    rows, words = packed.shape
    nibbles = unpack_int32(packed, NUM_BITS, (rows, words * 8)).view(rows, words, 8)
    return nibbles[:, :, NIBBLE_OF_OUTPUT].flatten(1)[:, :out_features].t().contiguous()
