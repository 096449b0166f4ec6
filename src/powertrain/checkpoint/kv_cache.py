"""Keys and values of 8 bits in a checkpoint, as compressed-tensors says it: `kv_cache_scheme`, `k_scale` and `v_scale`.

A layer's scales are of keys after the rotary embedding and of values, [1] or one for each of their heads [heads, 1, 1],
found by a calibration: absmax / 448 of 8-bit floats, absmax / 127.5 of integers. Other engines run these. Ours finds a
finer scale for each key and value as it is stored (`kernels/attention.py`) and takes only the type from the file.
Format: https://github.com/neuralmagic/compressed-tensors
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from powertrain.checkpoint.quantization_config import quantization_of, refuse
from powertrain.checkpoint.source import Checkpoint
from powertrain.kernels.rounding import INT8_STEPS, LARGEST_FLOAT8

Kind: TypeAlias = Literal["fp8", "int8"]
Sharing: TypeAlias = Literal["tensor", "attn_head"]

KINDS: tuple[Kind, ...] = get_args(Kind)
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)
FIELD = "kv_cache_scheme"
_TYPES: dict[str, Kind] = {"float": "fp8", "int": "int8"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KVCacheScheme:
    """`kind`: 8-bit floats (e4m3) or integers. `strategy`: which keys of a layer, and which values, share a scale."""

    kind: Kind
    strategy: Sharing = "tensor"

    @property
    def largest(self) -> float:
        """What the largest number becomes, as the library has it."""
        return LARGEST_FLOAT8 if self.kind == "fp8" else INT8_STEPS

    def scale_shape(self, num_kv_heads: int) -> tuple[int, ...]:
        """Of a layer's `k_scale`, and of its `v_scale`."""
        return (1,) if self.strategy == "tensor" else (num_kv_heads, 1, 1)

    def to_config(self) -> dict[str, Any]:
        """The `kv_cache_scheme` of a `quantization_config`."""
        kind = "float" if self.kind == "fp8" else "int"
        about = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": self.strategy, "dynamic": False}
        return about | {"group_size": None}


def kv_cache_kind(quantization: Mapping[str, Any]) -> Kind | None:
    """Of which type a `quantization_config` wants keys and values; None where it says nothing of them.

    Their scales may be any that ours are at least as fine as: for good, or found for each token. Raises
    `ModelFileError` for others.
    """
    scheme = quantization.get(FIELD)
    if not scheme:
        return None
    if not isinstance(scheme, dict):
        refuse(f"{FIELD} is a {type(scheme).__name__}, expected a mapping")
    kind = _TYPES.get(str(scheme.get("type", "int")).lower())
    if scheme.get("num_bits", 8) != 8 or kind is None or scheme.get("symmetric", True) is not True:
        refuse(f"{FIELD}: only symmetric int or float of 8 bits can be run")
    if scheme.get("strategy") not in (None, "token", *SHARINGS):
        refuse(f"{FIELD}: strategy {scheme['strategy']!r} cannot be run; {', '.join(SHARINGS)} and token can")
    return kind


def stored_cache_dtype(checkpoint: Checkpoint, *, has_float8: bool) -> Literal["auto"] | Kind:
    """What `--kv-cache-dtype auto` means for a checkpoint: the 8 bits that it was made for, or "auto".

    `has_float8`: whether there is a cache of 8-bit floats where it will run; else integers, as small, take its place.
    """
    quantization = quantization_of(checkpoint.config)
    if quantization is None or quantization.get("quant_method") != "compressed-tensors":
        return "auto"
    kind = kv_cache_kind(quantization)
    if kind is None:
        return "auto"
    chosen: Kind = kind if has_float8 else "int8"
    stand_in = "" if chosen == kind else f" in place of {kind}, which these kernels do not have"
    logger.info(
        "%s: %s asks for 8 bits: keys and values are kept in %s%s, each with a scale of its own, finer than the file's",
        checkpoint.path.name,
        FIELD,
        chosen,
        stand_in,
    )
    return chosen
