"""AWQ: input channels with large activations get a finer grid, by scales that are merged into the layers before.

Lin et al. 2023 (arXiv 2306.00978). The scale of a channel is mean(|x|)^a; of 20 exponents a that one is taken whose
rounded weights change the layer's output least, tr(E H E^T) with H the inputs' second moments, so that no activations
are kept. Then each group's range is clipped where that makes its own part of the same loss smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from powertrain.checkpoint.float_presets import FloatScheme
from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.floats import to_preset
from powertrain.compress.gptq import Moments
from powertrain.compress.model_step import StepContext
from powertrain.compress.plain_decoder import LINEARS_OF_STEP, OUTPUT_INPUT
from powertrain.compress.quantize import rtn
from powertrain.compress.recipe_fields import boolean, integer, refuse_unknown_keys
from powertrain.compress.scaling import Changes, centred, walk_blocks
from powertrain.model.families import model_config
from powertrain.types import PowertrainError, QuantScheme

if TYPE_CHECKING:
    from powertrain.compress.plan import LayerPlan

CLIP_SHARES = tuple(1.0 - 0.05 * step for step in range(11))
"""Shares of a group's range that the clipping search tries, down to half, as the authors' code does."""

UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")
"""Their products with each other are what counts, which the loss of one alone does not see (as the authors' code)."""

LEAST_SIZE = 1e-3
"""Channels that the calibration hardly saw are taken to be this share of the mean: other text may use them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqStep:
    """`{method: awq, exponents: 20, clip: true}`, before the steps that round: their schemes are what it looks at."""

    exponents: int = 20
    clip: bool = True

    @classmethod
    def parse(cls, entries: Mapping[str, Any], where: str) -> AwqStep:
        refuse_unknown_keys(entries, ("exponents", "clip"), where)
        exponents = integer(entries.get("exponents", 20), f"{where}.exponents", least=1)
        return cls(exponents=exponents, clip=boolean(entries.get("clip", True), f"{where}.clip"))

    @property
    def is_calibrated(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        return {"method": "awq", "exponents": self.exponents, "clip": self.clip}

    def outline(self, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        model_config(checkpoint.config)
        clips = ", then ranges clipped where rounded to nearest" if self.clip else ""
        return checkpoint, [
            f"awq: input channels scaled by mean(|x|)^a, one of {self.exponents} exponents per input{clips}; merged "
            "into norms, value and up projections"
        ]

    def apply(self, checkpoint: Checkpoint, context: StepContext) -> Checkpoint:
        if not context.layers:
            raise PowertrainError("awq: no step after it rounds a matrix, which its scales are for")
        changes = Changes(model_config(checkpoint.config))

        def look(index: int, step: int, weights: Mapping[str, torch.Tensor], moments: Moments) -> None:
            prefix = f"model.layers.{index}."
            plans = {
                name: context.layers[prefix + name] for name in LINEARS_OF_STEP[step] if prefix + name in context.layers
            }
            if not plans:
                return
            hessian = (moments.hessian / moments.num_tokens).float()
            sizes = (moments.size_sum / moments.num_tokens).float()
            if step == OUTPUT_INPUT:
                sizes = changes.share_over_heads(sizes)
            matrices = {name: weights[f"{name}.weight"] for name in plans}
            scale = choose_scale(matrices, plans, hessian, sizes, self.exponents)
            changes.scale_inputs(index, step, scale)
            for name, plan in plans.items():
                if self.clip and isinstance(plan.scheme, QuantScheme) and is_clipped(name, plan):
                    scaled = hessian / torch.outer(scale, scale)
                    changes.clip(prefix + name, choose_bounds(matrices[name] * scale, plan.scheme, scaled))

        walk_blocks(checkpoint, context, "awq", look)
        return changes.view(checkpoint)


def is_clipped(name: str, plan: LayerPlan) -> bool:
    """Whether a matrix's ranges are clipped: only where it is rounded to nearest within its minimum and maximum.

    A range search, or GPTQ's, would shrink what has been clipped once more.
    """
    return plan.step.method == "rtn" and plan.step.observer == "minmax" and name not in UNCLIPPED


def choose_scale(
    matrices: Mapping[str, torch.Tensor],
    plans: Mapping[str, LayerPlan],
    hessian: torch.Tensor,
    sizes: torch.Tensor,
    exponents: int = 20,
) -> torch.Tensor:
    """The scale [in] of the input that float32 `matrices` [out, in] share: that with the least tr(E H E^T) over all.

    hessian: [in, in], mean of x x^T; sizes: [in], mean of |x|.
    """
    sizes = sizes.clamp(min=LEAST_SIZE * float(sizes.mean()))
    best, least = torch.ones_like(sizes), float("inf")
    if float(sizes.max()) == 0:
        return best
    for number in range(exponents):
        scale = centred(sizes.pow(number / exponents))
        loss = 0.0
        for name, matrix in matrices.items():
            error = rounded(matrix * scale, plans[name].scheme, name) / scale - matrix
            loss += float(((error @ hessian) * error).sum(dtype=torch.float64))
        if loss < least:
            best, least = scale, loss
    return best


def choose_bounds(weight: torch.Tensor, scheme: QuantScheme, hessian: torch.Tensor) -> torch.Tensor:
    """Where to clip each group of a float32 weight [out, in]: bounds [out, groups] on its absolute values.

    A group's loss is e H_g e^T, with the part of `hessian` [in, in] that its own inputs make.
    """
    size = scheme.group_size or weight.shape[1]
    groups = weight.view(len(weight), -1, size)
    own = torch.stack([hessian[at : at + size, at : at + size] for at in range(0, len(hessian), size)])
    largest = groups.abs().amax(-1)
    best, least = largest, torch.full_like(largest, float("inf"))
    for share in CLIP_SHARES:
        limit = (largest * share).unsqueeze(-1)
        error = rounded(groups.clamp(-limit, limit).flatten(1), scheme, "weight").view_as(groups) - groups
        error = error.transpose(0, 1)
        loss = ((error @ own) * error).sum(-1).t()
        is_better = loss < least
        best, least = torch.where(is_better, limit.squeeze(-1), best), torch.where(is_better, loss, least)
    return best


def rounded(weight: torch.Tensor, scheme: QuantScheme | FloatScheme, name: str) -> torch.Tensor:
    """A matrix rounded to nearest, as floats."""
    if isinstance(scheme, FloatScheme):
        return to_preset(weight, scheme, search=False, name=name)[0].dequantize()
    return rtn(weight, scheme, name=name)[0].dequantize()
