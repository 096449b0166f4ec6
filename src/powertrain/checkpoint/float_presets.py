"""compressed-tensors' presets for floats of 8 and 4 bits, as they stand in a `quantization_config`.

Names and fields: https://github.com/neuralmagic/compressed-tensors (`quantization/quant_scheme.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from powertrain.checkpoint.float4 import MXFP4, NVFP4
from powertrain.checkpoint.float8 import BLOCK, FLOAT8
from powertrain.kernels.float4 import MXFP4_GROUP, NVFP4_GROUP
from powertrain.kernels.quantized import FLOAT8_BLOCK
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
