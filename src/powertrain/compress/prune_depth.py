"""Depth pruning: whole blocks taken out, those that change the stream least first.

Block influence is that of ShortGPT (Men et al. 2024, arXiv 2403.03853): one minus the mean cosine of the stream before
and after a block, over calibration tokens. What remains is an ordinary smaller model, which every engine runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.blockwise import TOKENS_AT_ONCE, block_of, names_by_block
from powertrain.compress.model_step import CheckpointView, Progress, StepContext
from powertrain.compress.plain_decoder import PlainBlock
from powertrain.compress.plain_model import EMBEDDING, PlainModel, mean_kl
from powertrain.compress.recipe_fields import fraction, integer, one_of, refuse_unknown_keys
from powertrain.model.families import model_config
from powertrain.types import PowertrainError

PER_LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Keys of a Hugging Face config that hold one entry per layer."""


Choose = Literal["influence", "spread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneDepthStep:
    """`{method: prune_depth, share: 0.3333, choose: influence}`: some blocks taken out.

    One of `share` (of the blocks that go, rounded; below 1 it leaves one), `keep` (how many stay) and `drop` (a list of
    those that go) is given. `choose`: those of least influence go, or with "spread" the first and the last stay and
    others at equal distances between them, which needs no calibration; nor does `drop`.
    """

    share: float | None = None
    keep: int | None = None
    drop: tuple[int, ...] | None = None
    choose: Choose = "influence"

    @classmethod
    def parse(cls, entries: Mapping[str, Any], where: str) -> PruneDepthStep:
        refuse_unknown_keys(entries, ("share", "keep", "drop", "choose"), where)
        given = [key for key in ("share", "keep", "drop") if key in entries]
        if len(given) != 1 or ("drop" in given and "choose" in entries):
            raise PowertrainError(f"{where}: prune_depth wants one of share, keep and drop, and choose not with drop")
        choose: Any = one_of(entries.get("choose", "influence"), ("influence", "spread"), f"{where}.choose")
        if "share" in entries:
            return cls(share=fraction(entries["share"], f"{where}.share"), choose=choose)
        if "keep" in entries:
            return cls(keep=integer(entries["keep"], f"{where}.keep", least=1), choose=choose)
        drop = entries["drop"]
        if not isinstance(drop, Sequence) or isinstance(drop, str) or not drop:
            raise PowertrainError(f"{where}.drop must be a list of layer numbers, got {drop!r}")
        return cls(drop=tuple(integer(layer, f"{where}.drop") for layer in drop))

    @property
    def is_calibrated(self) -> bool:
        return self.drop is None and self.choose == "influence"

    def to_dict(self) -> dict[str, Any]:
        if self.drop is not None:
            return {"method": "prune_depth", "drop": list(self.drop)}
        size = {"keep": self.keep} if self.share is None else {"share": self.share}
        return {"method": "prune_depth", **size, "choose": self.choose}

    def num_kept(self, num_layers: int) -> int:
        if self.share is None:
            return self.keep or 0
        return max(num_layers - round(self.share * num_layers), int(self.share < 1))

    def kept(self, num_layers: int, influences: Sequence[float] | None = None) -> list[int]:
        """The blocks that stay. A calibrated step without its `influences` gives as many, of the same shapes."""
        if self.drop is not None:
            return without(num_layers, self.drop)
        num_kept = self.num_kept(num_layers)
        if self.choose == "spread":
            return spread(num_layers, num_kept)
        return most_influential(influences or [0.0] * num_layers, num_kept)

    def outline(self, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        num_layers = model_config(checkpoint.config).num_layers
        kept = self.kept(num_layers)
        if self.drop is not None:
            chosen = f"without {', '.join(map(str, sorted(self.drop)))}"
        else:
            chosen = "by block influence" if self.is_calibrated else f"those numbered {', '.join(map(str, kept))}"
        return depth_pruned(checkpoint, kept), [f"prune_depth: {len(kept)} of {num_layers} blocks stay, {chosen}"]

    def apply(self, checkpoint: Checkpoint, context: StepContext) -> Checkpoint:
        influences = None
        if self.is_calibrated:
            assert context.calibration is not None
            influences = block_influence(checkpoint, context.calibration.token_ids, context.device, context.progress)
        return depth_pruned(checkpoint, self.kept(model_config(checkpoint.config).num_layers, influences))


def depth_pruned(source: Checkpoint, kept: Sequence[int]) -> Checkpoint:
    """The model with only the blocks `kept`, numbered anew: a view, nothing is read before `load`.

    kept: rising numbers of the source's blocks. Raises `PowertrainError` for others, or none.
    """
    num_layers = int(source.config["num_hidden_layers"])
    if not kept or list(kept) != sorted(set(kept)):
        raise PowertrainError(f"layers to keep must be given once each, in order, got {list(kept)}")
    if not (kept[0] >= 0 and kept[-1] < num_layers):
        raise PowertrainError(f"layers to keep must be in 0..{num_layers - 1}, got {list(kept)}")
    new_index = {old: new for new, old in enumerate(kept)}
    old_names: dict[str, str] = {}
    for name in source.names():
        block = block_of(name)
        if block is None:
            old_names[name] = name
        elif block in new_index:
            within = name.removeprefix(f"model.layers.{block}.")
            old_names[f"model.layers.{new_index[block]}.{within}"] = name
    shapes = {new: tuple(source.shape(old)) for new, old in old_names.items()}
    return CheckpointView(source, shapes, lambda name: source.load(old_names[name]), pruned_config(source.config, kept))


def pruned_config(config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """A Hugging Face config with only the layers `kept`, its lists of one entry per layer cut likewise."""
    num_layers = int(config["num_hidden_layers"])
    changed: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key in PER_LAYER_LISTS:
        entries = config.get(key)
        if isinstance(entries, list) and len(entries) == num_layers:
            changed[key] = [entries[index] for index in kept]
    if isinstance(first := config.get("max_window_layers"), int):
        # older Qwen configs: the layers from this one on see a window
        changed["max_window_layers"] = sum(index < first for index in kept)
    return {**config, **changed}


@torch.inference_mode()
def block_influence(
    checkpoint: Checkpoint,
    token_ids: torch.Tensor,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[float]:
    """The influence of each block over calibration tokens, int64 [samples, tokens]: 0 for one that only scales.

    In memory are one block and the stream. Float32 throughout; the mean of cosines in float64.
    """
    config = model_config(checkpoint.config)
    at_once = max(1, TOKENS_AT_ONCE // token_ids.shape[1])
    embedding = checkpoint.load(EMBEDDING)
    streams = [embedding[ids].float().to(device) for ids in torch.split(token_ids, at_once)]
    _, blocks, _ = names_by_block(checkpoint.names())
    influences = []
    for index, names in enumerate(blocks):
        prefix = f"model.layers.{index}."
        weights = {name.removeprefix(prefix): checkpoint.load(name).float().to(device) for name in names}
        block = PlainBlock(config, index, weights)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for at, x in enumerate(streams):
            streams[at] = block(x)
            total += functional.cosine_similarity(x, streams[at], dim=-1).sum(dtype=torch.float64)
        influences.append(1.0 - float(total) / token_ids.numel())
        if progress is not None:
            progress("block influence", index + 1, len(blocks))
    return influences


def most_influential(influences: Sequence[float], num_kept: int) -> list[int]:
    """The blocks to keep, in order: the `num_kept` of most influence; of equals the earlier one."""
    _check_num_kept(len(influences), num_kept)
    order = sorted(range(len(influences)), key=lambda index: (-influences[index], index))
    return sorted(order[:num_kept])


def spread(num_layers: int, num_kept: int) -> list[int]:
    """The blocks to keep, in order: the first, the last and others at equal distances, rounded; of one, the first."""
    _check_num_kept(num_layers, num_kept)
    gaps = max(num_kept - 1, 1)
    return [(index * (num_layers - 1) + gaps // 2) // gaps for index in range(num_kept)]


def _check_num_kept(num_layers: int, num_kept: int) -> None:
    if not 1 <= num_kept <= num_layers:
        raise PowertrainError(f"layers to keep must be 1 to {num_layers}, got {num_kept}")


def without(num_layers: int, dropped: Collection[int]) -> list[int]:
    """The blocks that are left. Raises `PowertrainError` for one that is not there, or if none is left."""
    unknown = sorted(set(dropped) - set(range(num_layers)))
    if unknown or len(set(dropped)) == num_layers:
        raise PowertrainError(f"layers to drop must be some of 0..{num_layers - 1}, not all, got {sorted(dropped)}")
    return [index for index in range(num_layers) if index not in dropped]


@torch.inference_mode()
def greedy_kept(
    model: PlainModel, token_ids: torch.Tensor, num_kept: int, progress: Progress | None = None
) -> tuple[list[int], list[float]]:
    """Blocks to keep, found by taking out one at a time that whose absence gives the least KL from the whole model.

    token_ids: int64 [samples, tokens], all at once through the model, which is in memory. Returns the blocks and the
    KL (nats per token) after each removal. About `n^2 / 2 - kept^2 / 2` passes for n blocks: for a GPU or few tokens.
    """
    target, kept, found = model.hidden(token_ids), list(range(model.config.num_layers)), []

    def kl(order: Sequence[int]) -> float:
        return float(mean_kl(target, model.head, model.hidden(token_ids, order), model.head))

    while len(kept) > max(num_kept, 1):
        trials = [(kl([other for other in kept if other != one]), one) for one in kept]
        least, gone = min(trials)
        kept.remove(gone)
        found.append(least)
        if progress is not None:
            progress("greedy removal", model.config.num_layers - len(kept), model.config.num_layers - num_kept)
    return kept, found
