"""compressed-tensors' presets for floats of 8 and 4 bits, as they stand in a `quantization_config`.

Names and fields: https://github.com/neuralmagic/compressed-tensors (`quantization/quant_scheme.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from powertrain.checkpoint.float4 import MXFP4, NVFP4, float4_weight_tensors
from powertrain.checkpoint.float8 import BLOCK, FLOAT8, Strategy, float8_weight_tensors
from powertrain.kernels.float4 import MXFP4_GROUP, NVFP4_GROUP
from powertrain.kernels.quantized import FLOAT8_BLOCK
from powertrain.model.float4 import Float4Weight
from powertrain.model.float8 import Float8Weight
from powertrain.types import PowertrainError


def _floats(num_bits: int, strategy: str, dynamic: bool = False, **others: Any) -> dict[str, Any]:
    kind = {"num_bits": num_bits, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic}
    return kind | {"group_size": None} | others


_PER_TOKEN = _floats(8, "token", dynamic=True)
_PER_128 = _floats(8, "group", dynamic=True, group_size=FLOAT8_BLOCK)

_PRESETS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "FP8": (FLOAT8, _floats(8, "tensor"), _floats(8, "tensor", observer="static_minmax")),
    "FP8_DYNAMIC": (FLOAT8, _floats(8, "channel"), _PER_TOKEN),
    "FP8_BLOCK": (FLOAT8, _floats(8, "block", block_structure=BLOCK), _PER_128),
    "NVFP4A16": (NVFP4, _floats(4, "tensor_group", group_size=NVFP4_GROUP, scale_dtype="torch.float8_e4m3fn"), None),
    "MXFP4A16": (MXFP4, _floats(4, "group", group_size=MXFP4_GROUP, scale_dtype="torch.uint8"), None),
}
"""Name -> (format, weights, input_activations)."""

FLOAT_PRESETS = tuple(_PRESETS)


def float_group(preset: str, targets: Sequence[str], *, rounds_input: bool = True) -> dict[str, Any]:
    """One of `config_groups`: the layers `targets` in the scheme `preset`, one of `FLOAT_PRESETS`.

    `rounds_input` False leaves out what a preset says of inputs (8-bit floats, weight only). Raises `PowertrainError`
    for another name.
    """
    if preset not in _PRESETS:
        raise PowertrainError(f"scheme {preset!r} is unknown; the known ones of floats are {', '.join(FLOAT_PRESETS)}")
    stored_format, weights, activations = deepcopy(_PRESETS[preset])
    return {
        "targets": list(targets),
        "weights": weights,
        "input_activations": activations if rounds_input else None,
        "output_activations": None,
        "format": stored_format,
    }


@dataclass(frozen=True, slots=True)
class FloatScheme:
    """How a matrix is stored as floats, by the name of its preset: one of `FLOAT_PRESETS`."""

    preset: str

    @property
    def strategy(self) -> Strategy | None:
        """Which weights of 8-bit floats share a scale; None for 4 bits."""
        strategies: dict[str, Strategy] = {"FP8": "tensor", "FP8_DYNAMIC": "channel", "FP8_BLOCK": "block"}
        return strategies.get(self.preset)

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale; None for a whole row or more."""
        return {"NVFP4A16": NVFP4_GROUP, "MXFP4A16": MXFP4_GROUP, "FP8_BLOCK": FLOAT8_BLOCK}.get(self.preset)

    @property
    def has_input_scale(self) -> bool:
        """Whether the file has one scale for the matrix's inputs, which a calibration must find."""
        return self.preset == "FP8"

    def nbytes(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Bytes of a matrix [out, in]: of its weights, and of their scales and its inputs'."""
        rows, columns = shape
        if self.preset == "NVFP4A16":
            return rows * columns // 2, rows * (columns // NVFP4_GROUP) + 4
        if self.preset == "MXFP4A16":
            return rows * columns // 2, rows * (columns // MXFP4_GROUP)
        num_scales = {
            "tensor": 1,
            "channel": rows,
            "block": math.ceil(rows / FLOAT8_BLOCK) * math.ceil(columns / FLOAT8_BLOCK),
        }
        return rows * columns, 4 * (num_scales[self.strategy or "tensor"] + self.has_input_scale)

    def tensors(
        self, prefix: str, weight: Float8Weight | Float4Weight, input_scale: float | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of the layer `prefix` as they stand in the file; `input_scale` where `has_input_scale`."""
        if isinstance(weight, Float4Weight):
            return float4_weight_tensors(prefix, weight)
        assert self.strategy is not None
        return float8_weight_tensors(prefix, weight, self.strategy, input_scale)
