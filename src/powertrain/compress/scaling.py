"""Scaling a matrix's input channels, the inverse merged into what computes them: the outputs stay the same.

Inputs come out of a norm, or row by row out of another matrix (the values for the output projection, the up projection
for the down one); either can be divided by any positive vector that the next matrices' columns are multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.blockwise import CalibratedWalk, names_by_block
from powertrain.compress.gptq import Moments
from powertrain.compress.model_step import CheckpointView, StepContext, shapes_of
from powertrain.compress.plain_decoder import ATTENTION_INPUT, DOWN_INPUT, LINEARS_OF_STEP, MLP_INPUT, OUTPUT_INPUT
from powertrain.model.families import ModelConfig, model_config

EMBEDDING = "model.embed_tokens.weight"

PRODUCER = {
    ATTENTION_INPUT: "input_layernorm",
    OUTPUT_INPUT: "self_attn.v_proj",
    MLP_INPUT: "post_attention_layernorm",
    DOWN_INPUT: "mlp.up_proj",
}
"""What computes each input of a block, and takes the inverse scales. `LINEARS_OF_STEP` has who reads it."""

Look = Callable[[int, int, Mapping[str, torch.Tensor], Moments], None]
"""(block, step, the block's weights by their names within it, moments of the step's input) -> None."""


class Changes:
    """What to multiply each tensor by, and where to clip it after that, by the tensor's name."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._factors: dict[str, torch.Tensor] = {}
        self._bounds: dict[str, torch.Tensor] = {}

    def scale_inputs(self, index: int, step: int, scale: torch.Tensor) -> None:
        """Multiply the columns of a step's matrices by `scale` [in], and divide what computes the input by it.

        For the output projection it must be equal for all query heads of a key head (`share_over_heads`).
        """
        prefix = f"model.layers.{index}."
        for name in LINEARS_OF_STEP[step]:
            self._multiply(f"{prefix}{name}.weight", scale)
        producer, inverse = PRODUCER[step], 1.0 / scale
        if step == OUTPUT_INPUT:
            inverse = self._heads(inverse)[:, 0].flatten()
        rows = inverse if step in (ATTENTION_INPUT, MLP_INPUT) else inverse.unsqueeze(1)
        self._multiply(f"{prefix}{producer}.weight", rows)
        self._multiply(f"{prefix}{producer}.bias", inverse)

    def share_over_heads(self, sizes: torch.Tensor) -> torch.Tensor:
        """The mean of `sizes` [heads * d] over the query heads that read the same value head, for each of them."""
        heads = self._heads(sizes)
        return heads.mean(1, keepdim=True).expand_as(heads).flatten()

    def clip(self, layer: str, bounds: torch.Tensor) -> None:
        """Clip the scaled matrix `layer` to +-`bounds` [out, groups]."""
        self._bounds[f"{layer}.weight"] = bounds.cpu()

    def view(self, source: Checkpoint) -> Checkpoint:
        def compute(name: str) -> torch.Tensor:
            tensor, factor, bounds = source.load(name), self._factors.get(name), self._bounds.get(name)
            if factor is not None:
                tensor = tensor.float() * factor
            if bounds is not None:
                groups = tensor.float().unflatten(1, (bounds.shape[1], -1))  # type: ignore[no-untyped-call]
                limit = bounds.unsqueeze(-1)
                tensor = groups.clamp(-limit, limit).flatten(1)
            return tensor

        return CheckpointView(source, shapes_of(source), compute)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[value heads, query heads of each, d] of [heads * d]."""
        return x.view(self._model.num_kv_heads, -1, self._model.head_dim)

    def _multiply(self, name: str, factor: torch.Tensor) -> None:
        known = self._factors.get(name)
        self._factors[name] = factor.cpu() if known is None else known * factor.cpu()


def walk_blocks(checkpoint: Checkpoint, context: StepContext, what: str, look: Look) -> None:
    """Take the calibration through the model as it is, and show `look` every step's input with its block's weights."""
    assert context.calibration is not None
    embedding = checkpoint.load(EMBEDDING).to(context.device)
    model = model_config(checkpoint.config)
    walk = CalibratedWalk(model, embedding, context.calibration.token_ids, keeps_original=False)
    step_of = {names[0]: step for step, names in LINEARS_OF_STEP.items()}
    _, blocks, _ = names_by_block(checkpoint.names())
    for index, names in enumerate(blocks):
        prefix = f"model.layers.{index}."
        weights = {name.removeprefix(prefix): checkpoint.load(name).to(context.device).float() for name in names}

        def show(
            name: str,
            weight: torch.Tensor,
            moments: Moments,
            index: int = index,
            weights: dict[str, torch.Tensor] = weights,
        ) -> torch.Tensor:
            look(index, step_of[name], weights, moments)
            return weight

        walk.through(index, weights, set(step_of), show)
        if context.progress is not None:
            context.progress(what, index + 1, len(blocks))


def centred(scale: torch.Tensor) -> torch.Tensor:
    """The scale over the geometric mean of its ends: weights and norms move as little as they can."""
    return scale / math.sqrt(float(scale.max()) * float(scale.min()))
