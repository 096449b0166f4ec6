"""SmoothQuant: outliers of the activations moved into the weights, where a grid per row bears them better.

Xiao et al. 2022 (arXiv 2211.10438). The inputs of the attention and the MLP are divided by
s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), merged into the norms, and the matrices' columns multiplied by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.gptq import Moments
from powertrain.compress.model_step import StepContext
from powertrain.compress.plain_decoder import ATTENTION_INPUT, LINEARS_OF_STEP, MLP_INPUT
from powertrain.compress.recipe_fields import fraction, refuse_unknown_keys
from powertrain.compress.scaling import Changes, walk_blocks
from powertrain.model.families import model_config

LEAST_SHARE = 1e-3
"""Of the mean over channels: what the calibration hardly saw is taken to be no smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothQuantStep:
    """`{method: smoothquant, alpha: 0.5}`, before the step that rounds to W8A8.

    alpha is the share of the activations' range that the weights take: 1 is all of it.
    """

    alpha: float = 0.5

    @classmethod
    def parse(cls, entries: Mapping[str, Any], where: str) -> SmoothQuantStep:
        refuse_unknown_keys(entries, ("alpha",), where)
        return cls(alpha=fraction(entries.get("alpha", 0.5), f"{where}.alpha"))

    @property
    def is_calibrated(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        return {"method": "smoothquant", "alpha": self.alpha}

    def outline(self, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        model_config(checkpoint.config)
        return checkpoint, [f"smoothquant (alpha {self.alpha:g}): activation outliers moved into weights through norms"]

    def apply(self, checkpoint: Checkpoint, context: StepContext) -> Checkpoint:
        changes = Changes(model_config(checkpoint.config))

        def look(index: int, step: int, weights: Mapping[str, torch.Tensor], moments: Moments) -> None:
            if step in (ATTENTION_INPUT, MLP_INPUT):
                largest = torch.stack([weights[f"{name}.weight"].abs().amax(0) for name in LINEARS_OF_STEP[step]]).amax(
                    0
                )
                changes.scale_inputs(index, step, smooth_scale(moments.size_max, largest, self.alpha))

        walk_blocks(checkpoint, context, "smoothquant", look)
        return changes.view(checkpoint)


def smooth_scale(inputs: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """s [in] of the largest sizes [in] of a layer's inputs and of its columns."""
    inputs, weights = (sizes.clamp(min=max(LEAST_SHARE * float(sizes.mean()), 1e-30)) for sizes in (inputs, weights))
    return inputs.pow(alpha) / weights.pow(1 - alpha)
