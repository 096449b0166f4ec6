"""Width pruning: MLP channels and attention heads taken out of every block, those that do least first.

Importance by activations, as in Minitron (Muralidharan et al. 2024, arXiv 2407.14679), over calibration tokens: of a
channel or head, the mean square of what it hands to the next matrix ("activation"), or of what that matrix makes of it
in the stream ("contribution"). Blocks keep equal numbers, so what remains is an ordinary smaller model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.blockwise import block_of
from powertrain.compress.gptq import Moments
from powertrain.compress.model_step import CheckpointView, StepContext, shapes_of
from powertrain.compress.plain_decoder import DOWN_INPUT, OUTPUT_INPUT
from powertrain.compress.recipe_fields import integer, one_of, refuse_unknown_keys
from powertrain.compress.scaling import walk_blocks
from powertrain.model.families import ModelConfig, model_config
from powertrain.types import PowertrainError

IMPORTANCES = ("contribution", "activation")
_SIZES = ("intermediate_size", "heads_per_group", "kv_heads")


class Width(NamedTuple):
    """Of a block: MLP channels, query heads of each key-value head, key-value heads."""

    intermediate_size: int
    heads_per_group: int
    kv_heads: int

    @classmethod
    def of(cls, config: ModelConfig) -> Width:
        return cls(config.intermediate_size, config.num_heads // config.num_kv_heads, config.num_kv_heads)


class Kept(NamedTuple):
    """What a block keeps, int64, rising: MLP channels, query heads, key-value heads."""

    channels: torch.Tensor
    heads: torch.Tensor
    kv_heads: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneWidthStep:
    """`{method: prune_width, intermediate_size: 1024, heads_per_group: 2, kv_heads: 3}`: what each block keeps.

    A size that is not given stays. `heads_per_group`: query heads of each key-value head.
    """

    intermediate_size: int | None = None
    heads_per_group: int | None = None
    kv_heads: int | None = None
    importance: str = "contribution"

    @classmethod
    def parse(cls, entries: Mapping[str, Any], where: str) -> PruneWidthStep:
        refuse_unknown_keys(entries, (*_SIZES, "importance"), where)
        sizes = {key: integer(entries[key], f"{where}.{key}", least=1) for key in _SIZES if key in entries}
        if not sizes:
            raise PowertrainError(f"{where}: prune_width wants at least one of {', '.join(_SIZES)}")
        kind = one_of(entries.get("importance", "contribution"), IMPORTANCES, f"{where}.importance")
        return cls(**sizes, importance=kind)

    @property
    def is_calibrated(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        sizes = {key: getattr(self, key) for key in _SIZES if getattr(self, key) is not None}
        return {"method": "prune_width", **sizes, "importance": self.importance}

    def width(self, config: ModelConfig) -> Width:
        """What is kept. Raises `PowertrainError` for more than there is."""
        now = Width.of(config)
        wanted = now._replace(**{key: value for key in _SIZES if (value := getattr(self, key)) is not None})
        for key, most, size in zip(_SIZES, now, wanted, strict=True):
            if size > most:
                raise PowertrainError(f"prune_width: {key} must be 1 to {most} for this model, got {size}")
        return wanted

    def outline(self, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        config = model_config(checkpoint.config)
        now, wanted = Width.of(config), self.width(config)
        changes = [f"{key} {a} -> {b}" for key, a, b in zip(_SIZES, now, wanted, strict=True) if a != b]
        first = most_important(torch.zeros(now[0]), torch.zeros(now.kv_heads, now.heads_per_group), wanted)
        shrunk = width_pruned(checkpoint, [first] * config.num_layers)
        return shrunk, [f"prune_width by {self.importance}: {', '.join(changes) or 'nothing to do'}"]

    def apply(self, checkpoint: Checkpoint, context: StepContext) -> Checkpoint:
        config = model_config(checkpoint.config)
        wanted, channels, heads = self.width(config), [], []

        def look(index: int, step: int, weights: Mapping[str, torch.Tensor], moments: Moments) -> None:
            if step == OUTPUT_INPUT:
                scores = group_importance(moments, weights["self_attn.o_proj.weight"], config.head_dim, self.importance)
                heads.append(scores.view(config.num_kv_heads, -1).cpu())
            elif step == DOWN_INPUT:
                channels.append(group_importance(moments, weights["mlp.down_proj.weight"], 1, self.importance).cpu())

        walk_blocks(checkpoint, context, "prune_width", look)
        kept = [most_important(*scores, wanted) for scores in zip(channels, heads, strict=True)]
        return width_pruned(checkpoint, kept)


def group_importance(moments: Moments, weight: torch.Tensor, size: int, kind: str) -> torch.Tensor:
    """Float64 [in / size]: the mean square per token of each group of `size` inputs, or of its product with the matrix.

    weight: [out, in], the matrix that reads these inputs.
    """
    second = moments.hessian / moments.num_tokens
    if kind == "activation":
        return second.diagonal().view(-1, size).sum(1)
    blocks = second.view(len(second) // size, size, -1, size).diagonal(dim1=0, dim2=2)  # [size, size, groups]
    columns = weight.to(second).view(len(weight), -1, size)
    gram = torch.einsum("ogi,ogj->gij", columns, columns)
    return torch.einsum("gij,ijg->g", gram, blocks)


def most_important(channels: torch.Tensor, heads: torch.Tensor, width: Width) -> Kept:
    """What stays, by importance [channels] and [kv heads, heads of each]: of equals the earlier one.

    Each key-value head keeps its best query heads; of the key-value heads those stay whose kept heads sum to most.
    """
    best = heads.argsort(dim=1, descending=True, stable=True)[:, : width.heads_per_group].sort(dim=1).values
    groups = heads.gather(1, best).sum(1).argsort(descending=True, stable=True)[: width.kv_heads].sort().values
    first_of_group = torch.arange(len(heads)).unsqueeze(1) * heads.shape[1]
    kept_channels = channels.argsort(descending=True, stable=True)[: width.intermediate_size].sort().values
    return Kept(kept_channels, (best + first_of_group)[groups].flatten(), groups)


def width_pruned(source: Checkpoint, kept: list[Kept]) -> Checkpoint:
    """The model with only what each block keeps: a view. All blocks must keep equal numbers."""
    config = model_config(source.config)
    changed = {
        "intermediate_size": len(kept[0].channels),
        "num_attention_heads": len(kept[0].heads),
        "num_key_value_heads": len(kept[0].kv_heads),
        "head_dim": config.head_dim,
    }

    def chosen(name: str) -> tuple[int, torch.Tensor] | None:
        """The axis and the indices that a tensor keeps."""
        block = block_of(name)
        if block is None:
            return None
        within = name.removeprefix(f"model.layers.{block}.").rsplit(".", 1)[0]
        of = kept[block]
        by_layer = {
            "mlp.gate_proj": (0, of.channels),
            "mlp.up_proj": (0, of.channels),
            "mlp.down_proj": (1, of.channels),
            "self_attn.q_proj": (0, _rows(of.heads, config.head_dim)),
            "self_attn.k_proj": (0, _rows(of.kv_heads, config.head_dim)),
            "self_attn.v_proj": (0, _rows(of.kv_heads, config.head_dim)),
            "self_attn.o_proj": (1, _rows(of.heads, config.head_dim)),
        }
        found = by_layer.get(within)
        # the bias of a matrix that loses columns is of its outputs, which all stay
        return None if found is None or (found[0] == 1 and name.endswith(".bias")) else found

    def compute(name: str) -> torch.Tensor:
        found = chosen(name)
        tensor = source.load(name)
        return tensor if found is None else tensor.index_select(*found)

    shapes = shapes_of(source)
    for name, shape in shapes.items():
        if (found := chosen(name)) is not None:
            axis, indices = found
            shapes[name] = (*shape[:axis], len(indices), *shape[axis + 1 :])
    return CheckpointView(source, shapes, compute, {**source.config, **changed})


def _rows(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    return (heads.unsqueeze(1) * head_dim + torch.arange(head_dim)).flatten()
