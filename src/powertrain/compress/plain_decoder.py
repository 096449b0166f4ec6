"""The decoder in plain torch on whole sequences, one block at a time: what calibration and training run.

No cache, no packing, no kernels of our own: weights are a mapping of names to float tensors, which a caller may replace
between the steps of a block, and gradients pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from powertrain.model.families import ModelConfig
from powertrain.model.layers import rope_frequencies

Weights = Mapping[str, torch.Tensor]
"""A block's tensors by their names within it: `self_attn.q_proj.weight`, `input_layernorm.weight`."""

ATTENTION_INPUT, OUTPUT_INPUT, MLP_INPUT, DOWN_INPUT = range(4)
LINEARS_OF_STEP: dict[int, tuple[str, ...]] = {
    ATTENTION_INPUT: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    OUTPUT_INPUT: ("self_attn.o_proj",),
    MLP_INPUT: ("mlp.gate_proj", "mlp.up_proj"),
    DOWN_INPUT: ("mlp.down_proj",),
}
"""The matrices that share an input, in the order in which a block multiplies by them."""


Rotations = tuple[torch.Tensor, torch.Tensor]
"""cos and sin float32 [tokens, d]."""


class PlainBlock:
    """One pre-norm block with the weights of `weights`, which are looked up anew at each use.

    `turns`: what `rotations` gives, where many blocks share it; each use makes its own otherwise.
    """

    def __init__(self, config: ModelConfig, index: int, weights: Weights, turns: Rotations | None = None) -> None:
        self.config = config
        self.window = config.windows[index]
        self.weights = weights
        self.turns = turns

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [sequences, tokens, hidden] after the block."""
        return self.with_mlp(self.with_attention(x))

    def with_attention(self, x: torch.Tensor) -> torch.Tensor:
        """x and what the block's attention adds to it."""
        return x + self.linear("self_attn.o_proj", self.attended(self.normed(x, "input_layernorm")))

    def with_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """x and what the block's MLP adds to it."""
        return x + self.linear("mlp.down_proj", self.gated(self.normed(x, "post_attention_layernorm")))

    def normed(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def attended(self, a: torch.Tensor) -> torch.Tensor:
        """What the output projection multiplies, of the normed input a: [sequences, tokens, heads * d]."""
        config, (rows, tokens, _) = self.config, a.shape
        query = self._heads(self.linear("self_attn.q_proj", a), config.num_heads, "self_attn.q_norm")
        query = rotate(query, *(self.turns or rotations(config, tokens, a.device)))
        key, value = self.keys_and_values(a)
        repeats = config.num_heads // config.num_kv_heads
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        mask = None
        if self.window is not None and self.window < tokens:
            distance = torch.arange(tokens, device=a.device)
            distance = distance.unsqueeze(1) - distance
            mask = (distance >= 0) & (distance < self.window)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return out.transpose(1, 2).reshape(rows, tokens, -1)

    def keys_and_values(self, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a cache would keep of the normed input a: rotated keys, and values, [sequences, kv_heads, tokens, d]."""
        key, value = self.linear("self_attn.k_proj", a), self.linear("self_attn.v_proj", a)
        key = self._heads(key, self.config.num_kv_heads, "self_attn.k_norm")
        key = rotate(key, *(self.turns or rotations(self.config, a.shape[1], a.device)))
        return key, self._heads(value, self.config.num_kv_heads, None)

    def gated(self, b: torch.Tensor) -> torch.Tensor:
        """What the down projection multiplies, of the normed input b: [sequences, tokens, inner]."""
        return functional.silu(self.linear("mlp.gate_proj", b)) * self.linear("mlp.up_proj", b)

    def _heads(self, x: torch.Tensor, num_heads: int, norm: str | None) -> torch.Tensor:
        """[sequences, heads, tokens, d] of [sequences, tokens, heads * d], normed where the model does that."""
        x = x.view(*x.shape[:2], num_heads, self.config.head_dim)
        if norm is not None and self.config.has_qk_norm:
            x = self.normed(x, norm)
        return x.transpose(1, 2)


def rotations(config: ModelConfig, num_tokens: int, device: torch.device) -> Rotations:
    """cos and sin float32 [tokens, d] of rotary angles, each half the same."""
    angles = torch.outer(torch.arange(num_tokens, dtype=torch.float32), rope_frequencies(config)).to(device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [.., tokens, d] with its dimensions i and i + d/2 turned as pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
