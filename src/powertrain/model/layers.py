"""The decoder's parts, each a few tensors and one call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from powertrain.kernels.attention import AttentionStep, LayerCache, paged_attention, rotate_and_write
from powertrain.kernels.fused import add_rms_norm, rms_norm, silu_mul
from powertrain.kernels.op import current_mode
from powertrain.kernels.quantized import MAX_UNROUNDED_ROWS
from powertrain.kernels.rounding import Rounded, add_rms_norm_rounded, silu_mul_rounded
from powertrain.model.families import ModelConfig
from powertrain.model.weights import Dense, GatedFormat, PiecewiseFormat, RoundedFormat, WeightFormat


class Linear:
    """x [tokens, in] -> [tokens, out] through a weight format. Several formats side by side are one wider output."""

    def __init__(self, formats: list[WeightFormat], bias: torch.Tensor | None = None) -> None:
        self.formats = formats
        self.bias = bias
        self.is_narrow = not any(isinstance(weight, Dense) for weight in formats)

    def __call__(self, x: torch.Tensor | Rounded) -> torch.Tensor:
        parts = [_product(weight, x) for weight in self.formats]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if self.bias is None else out + self.bias

    def in_pieces(self, x: torch.Tensor | Rounded) -> torch.Tensor:
        """As a call, or float32 [pieces, tokens, out] whose sum that is, for what sums them on its way."""
        weight = self.formats[0] if self.bias is None and len(self.formats) == 1 else None
        if isinstance(x, Rounded):
            return weight.matmul_rounded(x, True) if isinstance(weight, RoundedFormat) else self(x)
        return weight.matmul_in_pieces(x) if isinstance(weight, PiecewiseFormat) else self(x)

    def rounds(self, num_rows: int) -> torch.dtype | None:
        """The 8-bit type that the product of so many rows wants its input in; None for floats."""
        if current_mode() != "fast":
            return None
        wanted = {fmt.rounded_dtype() if isinstance(fmt, RoundedFormat) else None for fmt in self.formats}
        dtype = wanted.pop() if len(wanted) == 1 else None
        return None if dtype is None or num_rows <= MAX_UNROUNDED_ROWS[dtype] else dtype

    def gated(self, x: torch.Tensor | Rounded) -> torch.Tensor:
        """silu of the first half of the outputs times the second half, [tokens, out / 2]."""
        fused = None
        is_one = self.bias is None and len(self.formats) == 1
        if is_one and isinstance(self.formats[0], GatedFormat) and not isinstance(x, Rounded):
            fused = self.formats[0].gated_matmul(x)
        return silu_mul(self(x)) if fused is None else fused

    def gated_and_rounded(self, x: torch.Tensor | Rounded, to: torch.dtype) -> Rounded:
        """`gated`, rounded `to` 8 bits."""
        is_one = self.bias is None and len(self.formats) == 1
        if is_one and isinstance(x, Rounded) and isinstance(self.formats[0], RoundedFormat):
            return self.formats[0].gated_rounded(x, to)
        product = self(x)
        return Rounded(*silu_mul_rounded(product, to), product.dtype)

    def step_bytes(self) -> int:
        return sum(weight.step_bytes() for weight in self.formats)

    def nbytes(self) -> int:
        return sum(weight.nbytes() for weight in self.formats)


def _product(weight: WeightFormat, x: torch.Tensor | Rounded) -> torch.Tensor:
    if not isinstance(x, Rounded):
        return weight.matmul(x)
    assert isinstance(weight, RoundedFormat)
    return weight.matmul_rounded(x)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def after(self, x: torch.Tensor, delta: torch.Tensor, product: Linear) -> torch.Tensor | Rounded:
        """The norm of x + delta, which x becomes; delta [tokens, d], or the pieces of a product [pieces, tokens, d].

        Rounded to 8 bits where `product`, which comes next, wants that.
        """
        to = product.rounds(x.shape[0])
        if to is None:
            return add_rms_norm(x, delta, self.weight, self.eps, product.is_narrow)
        return Rounded(*add_rms_norm_rounded(x, delta, self.weight, self.eps, to), x.dtype)


class Rope:
    """Tables of rotary angles for every position up to the model's length, in the layout `apply_rope` wants."""

    def __init__(self, config: ModelConfig, max_position: int, device: torch.device, dtype: torch.dtype) -> None:
        frequencies = rope_frequencies(config)
        angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat((cos, cos), dim=-1).to(device, dtype).unsqueeze(1)
        self._sin = torch.cat((-sin, sin), dim=-1).to(device, dtype).unsqueeze(1)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [positions, d / 2] of each pair of dimensions, contiguous."""
        half = self._cos.shape[-1] // 2
        return self._cos[:, 0, :half].contiguous(), self._sin[:, 0, half:].contiguous()

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [tokens, 1, d] for one step; shared by all layers."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Angle per position of each pair of dimensions, float32 [d / 2], with the config's long-context scaling.

    The `llama3` rule is the one published with Llama 3.1 (arXiv 2407.21783): wavelengths above the original context
    divided by `low_freq_factor` are stretched in full, those below it over `high_freq_factor` not at all.
    """
    dims = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (dims / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "factors":
        return frequencies / torch.tensor(scaling.factors, dtype=torch.float32)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention over the paged cache: one product for q, k and v, rotation, cache write, attention."""

    qkv: Linear
    output: Linear
    query_norm: RMSNorm | None
    key_norm: RMSNorm | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None

    def __call__(
        self,
        x: torch.Tensor | Rounded,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
        step: AttentionStep,
    ) -> torch.Tensor:
        qkv = self.qkv.in_pieces(x)
        qkv = qkv.view(*qkv.shape[:-1], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        norms, eps = None, 0.0
        if self.query_norm is not None and self.key_norm is not None:
            norms, eps = (self.query_norm.weight, self.key_norm.weight), self.query_norm.eps
        query = rotate_and_write(qkv, rope, norms, eps, cache, step)
        out = paged_attention(query, cache, step, self.window)
        return self.output.in_pieces(out.flatten(1))


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up as one product."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor | Rounded) -> torch.Tensor:
        to = self.down.rounds(x.values.shape[0] if isinstance(x, Rounded) else x.shape[0])
        if to is None:
            return self.down.in_pieces(self.gate_up.gated(x))
        return self.down.in_pieces(self.gate_up.gated_and_rounded(x, to))


@dataclass(frozen=True, slots=True)
class Block:
    """One pre-norm transformer layer. What it adds to the stream x is handed on and added with the next norm."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    def __call__(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
        step: AttentionStep,
    ) -> torch.Tensor:
        """x [tokens, hidden] becomes x + delta + this layer's attention; returns what its MLP adds, maybe in pieces."""
        if delta is None:
            normed: torch.Tensor | Rounded = self.attention_norm(x)
        else:
            normed = self.attention_norm.after(x, delta, self.attention.qkv)
        attended = self.attention(normed, rope, cache, step)
        return self.mlp(self.mlp_norm.after(x, attended, self.mlp.gate_up))

    def linears(self) -> list[Linear]:
        return [self.attention.qkv, self.attention.output, self.mlp.gate_up, self.mlp.down]
