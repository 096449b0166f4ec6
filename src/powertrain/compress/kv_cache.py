"""Scales of 8-bit keys and values for good, of what calibration text makes of them after everything else was done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from powertrain.checkpoint.kv_cache import KINDS, SHARINGS, Kind, KVCacheScheme, Sharing
from powertrain.compress.recipe_fields import one_of, refuse_unknown_keys
from powertrain.model.families import ModelConfig
from powertrain.types import PowertrainError

KV_CACHE = "kv_cache"
"""The method's name in a recipe."""

_FOUND_LATE = ("channel", "token", "group")
"""Keys per channel and values per token, as 4 bits want: a file has one strategy for both, and no shape for these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheStep:
    """`{method: kv_cache, scheme: fp8, strategy: tensor}`, the last step: it measures what the others leave."""

    scheme: KVCacheScheme

    @classmethod
    def parse(cls, entries: Mapping[str, Any], where: str) -> KVCacheStep:
        """The step of its entries without `method`. Raises `PowertrainError` naming what has no place in a file."""
        refuse_unknown_keys(entries, ("scheme", "strategy"), where)
        kind, strategy = entries.get("scheme"), entries.get("strategy", "tensor")
        if kind == "int4" or strategy in _FOUND_LATE:
            asked = f"scheme: {kind}" if kind == "int4" else f"strategy: {strategy}"
            raise PowertrainError(
                f"{where}.{asked} has scales that are found as tokens come, which no file holds; "
                "`evaluate --kernels reference --kv-cache-dtype int4` shows what 4 bits cost"
            )
        kind = one_of(kind, KINDS, f"{where}.scheme")
        strategy = one_of(strategy, SHARINGS, f"{where}.strategy")
        return cls(scheme=KVCacheScheme(cast(Kind, kind), cast(Sharing, strategy)))

    @property
    def is_calibrated(self) -> bool:
        return True

    def to_dict(self) -> dict[str, Any]:
        return {"method": KV_CACHE, "scheme": self.scheme.kind, "strategy": self.scheme.strategy}

    def nbytes(self, model: ModelConfig) -> int:
        """Of all layers' scales, in float32."""
        return 2 * 4 * model.num_layers * math.prod(self.scheme.scale_shape(model.num_kv_heads))

    def note(self, model: ModelConfig) -> str:
        """For --dry-run, the report and the manifest."""
        each = "layer" if self.scheme.strategy == "tensor" else f"head ({model.num_kv_heads} a layer)"
        return (
            f"kv_cache: {self.scheme.kind} keys and values, scales for each {each} from calibration text; others use "
            "them, this engine finds finer ones as it runs"
        )


class CacheSizes:
    """The largest key and the largest value of each head of one layer, over all tokens seen."""

    def __init__(self) -> None:
        self._largest: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys, after the rotary embedding, and values of some tokens: [sequences, kv_heads, tokens, d]."""
        found = keys.float().abs().amax((0, 2, 3)), values.float().abs().amax((0, 2, 3))
        known = self._largest or found
        self._largest = torch.maximum(known[0], found[0]), torch.maximum(known[1], found[1])

    def largest(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 [kv_heads] of keys and of values. Raises `PowertrainError` naming the layer for NaN or infinity."""
        assert self._largest is not None
        for what, sizes in zip(("keys", "values"), self._largest, strict=True):
            if not bool(torch.isfinite(sizes).all()):
                raise PowertrainError(f"{name}: its {what} hold NaN or infinity on the calibration text")
        return self._largest

    def tensors(self, name: str, scheme: KVCacheScheme, num_kv_heads: int) -> dict[str, torch.Tensor]:
        """`k_scale` and `v_scale` of the layer `name` (`model.layers.0.self_attn`) as they are stored, float32."""
        made = {}
        for suffix, sizes in zip(("k_scale", "v_scale"), self.largest(name), strict=True):
            shared = sizes.amax(0, keepdim=True) if scheme.strategy == "tensor" else sizes
            scale = torch.where(shared == 0, 1.0, shared / scheme.largest)
            made[f"{name}.{suffix}"] = scale.view(scheme.scale_shape(num_kv_heads)).cpu()
        return made
