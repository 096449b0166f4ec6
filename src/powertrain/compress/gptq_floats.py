"""GPTQ onto grids of 8-bit and 4-bit floats: the scales of rounding to nearest, and each column's error made up for."""

from __future__ import annotations

import torch

from powertrain.checkpoint.float_presets import FloatScheme
from powertrain.compress.floats import to_preset
from powertrain.compress.gptq import GptqOptions, Moments, rounded_matrix
from powertrain.compress.quantize import weight_error
from powertrain.kernels.float4 import float4_codes, pack_codes, power_of_two, round_to_float4
from powertrain.kernels.quantized import FLOAT8_BLOCK
from powertrain.kernels.rounding import LARGEST_FLOAT8
from powertrain.model.float4 import Float4Weight
from powertrain.model.float8 import Float8Weight


def gptq_floats(
    weight: torch.Tensor,
    scheme: FloatScheme,
    moments: Moments,
    options: GptqOptions | None = None,
    *,
    absmax: float | None = None,
    name: str = "weight",
) -> tuple[Float8Weight | Float4Weight, float]:
    """Round a float matrix [out, in] as a preset says, so that its outputs change least (`compress/gptq.py`).

    The scales are those that `to_preset` chooses, by search unless `options.observer` is "minmax"; `absmax` as there.
    Returns the matrix and the normalised squared weight error; raises what `to_preset` and `rounded_matrix` do.
    """
    options = options or GptqOptions()
    plain, _ = to_preset(weight, scheme, search=options.observer != "minmax", absmax=absmax, name=name)
    scale = _scale_of_each(plain, weight.shape[1])
    by_input = scale.t().contiguous()
    is_float8 = isinstance(plain, Float8Weight)

    def nearest(index: int, column: torch.Tensor) -> torch.Tensor:
        steps = column / by_input[index]
        return (_round_to_float8(steps) if is_float8 else round_to_float4(steps)).mul_(by_input[index])

    steps = rounded_matrix(weight.float(), nearest, moments, options, name) / scale
    rounded: Float8Weight | Float4Weight
    if isinstance(plain, Float8Weight):
        rounded = plain._replace(values=_round_to_float8(steps).to(torch.float8_e4m3fn))
    else:
        rounded = plain._replace(packed=pack_codes(float4_codes(steps)))
    return rounded, weight_error(weight.float(), rounded.dequantize())


def _round_to_float8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).float()


def _scale_of_each(plain: Float8Weight | Float4Weight, width: int) -> torch.Tensor:
    """float32 [out, in]: what each weight's number is multiplied by."""
    if isinstance(plain, Float8Weight):
        if plain.scale.dim() == 1:
            return plain.scale.unsqueeze(1).expand(-1, width)
        rows = plain.scale.repeat_interleave(FLOAT8_BLOCK, 0)[: plain.values.shape[0]]
        return rows.repeat_interleave(FLOAT8_BLOCK, 1)[:, :width]
    scale = power_of_two(plain.scale) if plain.global_scale is None else plain.scale.float() / plain.global_scale
    return scale.repeat_interleave(width // scale.shape[1], 1)
