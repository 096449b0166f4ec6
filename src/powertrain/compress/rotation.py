"""Rotations merged into the weights: the same outputs from weights without outliers.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) and SpinQuant (Liu et al. 2024, arXiv 2405.16406). R1 turns the residual
stream: an RMS norm without weights commutes with it, so the norms' weights go into the matrices after them first. R2
turns each head's values and is undone by the output projection. What the down projection multiplies comes out of a
product of two activations, which a rotation does not pass: it would have to run in the engine, and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.blockwise import block_of
from powertrain.compress.hadamard import hadamard, random_hadamard, random_orthogonal
from powertrain.compress.model_step import CheckpointView, StepContext, shapes_of
from powertrain.compress.recipe_fields import integer, one_of, refuse_unknown_keys
from powertrain.model.families import ModelConfig, model_config
from powertrain.types import PowertrainError

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
NORM_BEFORE = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
"""The matrices of a block that read the residual stream, and the norm that each reads it through."""

Kind = Literal["hadamard", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateStep:
    """`{method: rotate, kind: hadamard|random, seed: 0}`: R1 and R2, merged."""

    kind: Kind = "hadamard"
    seed: int = 0

    @classmethod
    def parse(cls, entries: Mapping[str, Any], where: str) -> RotateStep:
        refuse_unknown_keys(entries, ("kind", "seed"), where)
        kind = one_of(entries.get("kind", "hadamard"), ("hadamard", "random"), f"{where}.kind")
        seed = integer(entries.get("seed", 0), f"{where}.seed")
        return cls(kind="random" if kind == "random" else "hadamard", seed=seed)

    @property
    def is_calibrated(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        return {"method": "rotate", "kind": self.kind, "seed": self.seed}

    def outline(self, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        model = model_config(checkpoint.config)
        if self.kind == "hadamard":
            for what, order in (("hidden_size", model.hidden_size), ("head_dim", model.head_dim)):
                try:
                    hadamard(order)
                except PowertrainError as error:
                    raise PowertrainError(f"rotate: {what} {order}: {error}") from None
        notes = [
            f"rotate ({self.kind}, seed {self.seed}): the residual stream and each head's values are turned, norms "
            "become ones; the down projections' inputs are not (it cannot be merged)"
        ]
        shapes = shapes_of(checkpoint)
        if HEAD not in shapes:
            num_weights = math.prod(shapes[EMBEDDING])
            notes.append(
                f"rotate unties lm_head: the final norm goes into it, so it and the embedding are stored, "
                f"{num_weights:,} weights each ({2 * num_weights:,} bytes more as bfloat16)"
            )
            shapes[HEAD] = shapes[EMBEDDING]
        config = {**checkpoint.config, "tie_word_embeddings": False}
        return CheckpointView(checkpoint, shapes, checkpoint.load, config), notes

    def apply(self, checkpoint: Checkpoint, context: StepContext) -> Checkpoint:
        outline, _ = self.outline(checkpoint)
        rotated = _Rotated(checkpoint, model_config(checkpoint.config), self, context.device)
        return CheckpointView(checkpoint, shapes_of(outline), rotated.load, outline.config)


class _Rotated:
    """A model's tensors after R1 and R2, computed in float64, as float32 on the CPU."""

    def __init__(self, source: Checkpoint, model: ModelConfig, step: RotateStep, device: torch.device) -> None:
        self._source = source
        self._model = model
        self._step = step
        self._device = device
        self._has_head = HEAD in source.names()
        self._stream = self._orthogonal(model.hidden_size, 0)

    def load(self, name: str) -> torch.Tensor:
        return self._rotated(name).float().cpu()

    def _rotated(self, name: str) -> torch.Tensor:
        if name == EMBEDDING:
            return self._load(name) @ self._stream
        if name == HEAD:
            head = self._load(HEAD if self._has_head else EMBEDDING)
            return (head * self._load(FINAL_NORM)) @ self._stream
        index, tensor = block_of(name), self._load(name)
        within, _, kind = (name if index is None else name.split(".", 3)[3]).rpartition(".")
        if within in ("input_layernorm", "post_attention_layernorm") or name == FINAL_NORM:
            return torch.ones_like(tensor)
        if index is None:
            return tensor
        if within in NORM_BEFORE and kind == "weight":
            norm = self._load(f"model.layers.{index}.{NORM_BEFORE[within]}.weight")
            tensor = (tensor * norm) @ self._stream
        if within == "self_attn.v_proj":
            return self._turn_heads(tensor.t(), index).t()
        if within in ("self_attn.o_proj", "mlp.down_proj"):
            if within == "self_attn.o_proj" and kind == "weight":
                tensor = self._turn_heads(tensor, index)
            return self._stream.t() @ tensor
        return tensor

    def _turn_heads(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """x [.., heads * d] with each head times the block's R2."""
        turn = self._orthogonal(self._model.head_dim, 1 + index)
        return (x.reshape(*x.shape[:-1], -1, self._model.head_dim) @ turn).reshape(x.shape)

    def _load(self, name: str) -> torch.Tensor:
        return self._source.load(name).to(self._device, torch.float64)

    def _orthogonal(self, order: int, number: int) -> torch.Tensor:
        """The `number`th rotation of the step: the same for the same seed, on every device."""
        generator = torch.Generator().manual_seed(self._step.seed * 10_007 + number)
        make = random_hadamard if self._step.kind == "hadamard" else random_orthogonal
        return make(order, generator).to(self._device)
