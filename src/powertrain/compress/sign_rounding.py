"""Rounding learned by signed gradients: which way each weight of a block goes, and how far each group's grid reaches.

Cheng et al. 2023 (AutoRound, arXiv 2309.05516). All matrices of one block are rounded together so that the block's
*output* is what it was: every weight has an offset in [-1/2, 1/2] that is added before rounding, every group a factor
of its range. Rounding passes gradients as if it were not there, and each step moves every parameter by the same length
against the sign of its gradient, a length that falls linearly to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from powertrain.compress.plain_decoder import PlainBlock, Weights
from powertrain.compress.quantize import check_group_size
from powertrain.compress.ranges import Observer, choose_range
from powertrain.compress.recipe_fields import boolean, integer, one_of
from powertrain.model.families import ModelConfig
from powertrain.model.weights import IntWeight
from powertrain.types import PowertrainError, QuantScheme

KEYS = ("iterations", "batch_size", "learning_rate", "target", "autocast")
"""What a recipe's step may set."""

MIN_FACTOR = 0.1
"""The least share of its first length that a range may shrink to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignRoundingOptions:
    """`learning_rate`: the first step's length; 1 / iterations if None, so that a parameter can go half a grid step.

    `batch_size`: sequences in a step. `observer`: where the ranges begin; they may grow back to the whole range.
    `tunes_range`: whether they are learned too. `autocast`: run the block's products in bfloat16 (on a GPU).
    `target`, for who gives the block's targets: what the original block gave in the original model, or what it gives
    for the compressed model's stream.
    """

    iterations: int = 200
    batch_size: int = 8
    learning_rate: float | None = None
    observer: Observer = "mse"
    tunes_range: bool = True
    autocast: bool = False
    target: Literal["original", "compressed"] = "original"
    seed: int = 0

    @property
    def first_step(self) -> float:
        return self.learning_rate if self.learning_rate is not None else 1.0 / max(1, self.iterations)

    @classmethod
    def parse(cls, step: Mapping[str, Any], observer: Observer, where: str) -> SignRoundingOptions:
        """Of the entries `KEYS` of a recipe's step. Raises `PowertrainError` naming the entry that cannot be."""
        rate = step.get("learning_rate", "auto")
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate != "auto" and not (is_number and 0 < rate < math.inf):
            raise PowertrainError(f"{where}.learning_rate must be a number above zero or `auto`, got {rate!r}")
        return cls(
            iterations=integer(step.get("iterations", 200), f"{where}.iterations"),
            batch_size=integer(step.get("batch_size", 8), f"{where}.batch_size", least=1),
            learning_rate=None if rate == "auto" else float(rate),
            observer=observer,
            autocast=boolean(step.get("autocast", False), f"{where}.autocast"),
            target=one_of(step.get("target", "original"), ("original", "compressed"), f"{where}.target"),  # type: ignore[arg-type]
        )

    def to_dict(self) -> dict[str, Any]:
        """The entries, every default written out."""
        return {
            **{key: getattr(self, key) for key in KEYS},
            "learning_rate": "auto" if self.learning_rate is None else self.learning_rate,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedBlock:
    """Integers of each matrix by its name within the block, and the mean squared error of the block's output.

    `first_error` is that of rounding to nearest, `error` that of the integers returned, both on all sequences.
    """

    matrices: dict[str, IntWeight]
    first_error: float
    error: float


def round_block(
    config: ModelConfig,
    index: int,
    weights: Weights,
    schemes: Mapping[str, QuantScheme],
    inputs: Tensor,
    targets: Tensor,
    options: SignRoundingOptions | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> RoundedBlock:
    """Round the matrices of block `index` that `schemes` names (`self_attn.q_proj`), so that inputs give targets.

    weights: the block's tensors, float32. inputs, targets: float32 [sequences, tokens, hidden], before and after it.
    The iterate that is kept is the one whose error on its batch is the smallest share of rounding to nearest's on the
    same batch; if that is no better on all sequences, rounding to nearest is what comes back. The same seed gives the
    same integers. Raises `PowertrainError` naming the block for activations that are not finite, naming the layer for
    weights that are not or groups that do not divide its rows.
    """
    options = options or SignRoundingOptions()
    if not len(inputs):
        raise PowertrainError(f"model.layers.{index}: signed-gradient rounding needs calibration text, there is none")
    with torch.inference_mode(False), torch.enable_grad():
        # copies: what was made in inference mode cannot be part of a graph
        fixed = {name: tensor.detach().clone() for name, tensor in weights.items()}
        roundings = {
            name: TrainableRounding(
                fixed.pop(f"{name}.weight"), scheme, options, scale_dtype, f"model.layers.{index}.{name}"
            )
            for name, scheme in schemes.items()
        }
        block = _RoundedForward(PlainBlock(config, index, fixed), roundings, options)
        first = block.errors(inputs, targets)
        if not bool(torch.isfinite(first).all()):
            raise PowertrainError(f"model.layers.{index}: its activations on the calibration text are not finite")
        error = first
        if options.iterations and float(first.sum()) > 0:
            error = _train(block, inputs, targets, first)
        matrices = {name: rounding.to_integers() for name, rounding in roundings.items()}
    return RoundedBlock(matrices=matrices, first_error=float(first.mean()), error=float(error.mean()))


def _train(block: _RoundedForward, inputs: Tensor, targets: Tensor, first: Tensor) -> Tensor:
    """Move the block's parameters; they end as the best iterate. Returns its error of each sequence."""
    options, roundings = block.options, block.roundings.values()
    start = [rounding.state() for rounding in roundings]
    best, best_share = start, 1.0
    batches = _batches(len(inputs), options)
    for iteration in range(options.iterations):
        picked = next(batches).to(inputs.device)
        loss = block.loss(inputs[picked], targets[picked])
        share = float(loss.detach()) / max(float(first[picked].mean()), math.ulp(0.0))
        if share < best_share:
            best, best_share = [rounding.state() for rounding in roundings], share
        loss.backward()  # type: ignore[no-untyped-call]
        for rounding in roundings:
            rounding.step(options.first_step * (1.0 - iteration / options.iterations))
    for rounding, state in zip(roundings, best, strict=True):
        rounding.restore(state)
    error = block.errors(inputs, targets)
    if not float(error.sum()) < float(first.sum()):
        for rounding, state in zip(roundings, start, strict=True):
            rounding.restore(state)
        return first
    return error


def _batches(num_sequences: int, options: SignRoundingOptions) -> Iterator[Tensor]:
    """Rows of the sequences for each step without end: all in a drawn order, then all in another."""
    generator = torch.Generator().manual_seed(options.seed)
    size, left = min(options.batch_size, num_sequences), torch.empty(0, dtype=torch.int64)
    while True:
        if len(left) < size:
            left = torch.randperm(num_sequences, generator=generator)
        yield left[:size]
        left = left[size:]


class _RoundedForward:
    """A block whose matrices are rounded anew at every pass."""

    def __init__(
        self, block: PlainBlock, roundings: Mapping[str, TrainableRounding], options: SignRoundingOptions
    ) -> None:
        self.block, self.roundings, self.options = block, roundings, options
        self._fixed = block.weights

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the block's output, x and target [sequences, tokens, hidden]."""
        self._round()
        return functional.mse_loss(self._forward(x), target)

    @torch.no_grad()
    def errors(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The error of each sequence, float32 [sequences]."""
        self._round()
        size = self.options.batch_size
        pairs = zip(torch.split(inputs, size), torch.split(targets, size), strict=True)
        return torch.cat([(self._forward(x) - target).square().mean(dim=(1, 2)) for x, target in pairs])

    def _round(self) -> None:
        rounded = {f"{name}.weight": rounding.weight() for name, rounding in self.roundings.items()}
        self.block.weights = {**self._fixed, **rounded}

    def _forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.options.autocast):
            return self.block(x).float()


class TrainableRounding:
    """A matrix [out, in] on a grid, with an offset per weight and one or two range factors per group to learn."""

    def __init__(
        self, weight: Tensor, scheme: QuantScheme, options: SignRoundingOptions, scale_dtype: torch.dtype, name: str
    ) -> None:
        """`name` is the layer's for errors: NaN, a scale beyond `scale_dtype`, groups that do not divide a row."""
        check_group_size(name, weight.shape[1], scheme.group_size)
        self._shape, self._num_bits, self._scale_dtype = weight.shape, scheme.num_bits, scale_dtype
        self._groups = weight.float().view(len(weight), -1, scheme.group_size or weight.shape[1])
        of_groups = (self._groups, scheme.num_bits, scheme.symmetric)
        self._scale, self._zero = choose_range(*of_groups, options.observer, scale_dtype, name)
        whole, _ = choose_range(*of_groups, "minmax", scale_dtype, name)
        self._largest = (whole / self._scale).clamp_(min=1.0)
        self._offset = torch.zeros_like(self._groups, requires_grad=True)
        # symmetric: one factor, of both ends; asymmetric: one of what lies above zero, one of what lies below
        self._factors = [
            torch.ones_like(self._scale, requires_grad=options.tunes_range) for _ in range(1 if scheme.symmetric else 2)
        ]

    @property
    def _ends(self) -> tuple[int, int]:
        return -(2 ** (self._num_bits - 1)), 2 ** (self._num_bits - 1) - 1

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point, float32 [out, groups], as they would be stored; gradients pass."""
        low, high = self._ends
        if self._zero is None:
            return self._storable(self._scale * self._factors[0]), None
        above, below = self._factors
        reach = (high - self._zero) * above + (self._zero - low) * below
        scale = self._storable(self._scale * (reach / (high - low)))
        position = low + (self._zero - low) * below * (self._scale / scale)
        return scale, _straight(position, position.detach().round()).clamp(low, high)

    def weight(self) -> Tensor:
        """The rounded matrix, float32 [out, in]; gradients pass to offsets and factors."""
        scale, zero = self.grid()
        values = self._integers(scale, zero)
        steps = values if zero is None else values - zero.unsqueeze(-1)
        return (steps * scale.unsqueeze(-1)).view(self._shape)

    def _integers(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        position = self._groups / scale.unsqueeze(-1)
        position = position if zero is None else position + zero.unsqueeze(-1)
        position = position + self._offset
        return _straight(position, position.detach().round()).clamp(*self._ends)

    def _storable(self, scale: Tensor) -> Tensor:
        """The scale as it reads back from its stored type, never zero."""
        tiny = torch.finfo(self._scale_dtype).tiny
        return _straight(scale, scale.detach().to(self._scale_dtype).to(torch.float32).clamp_(min=tiny))

    @torch.no_grad()
    def step(self, length: float) -> None:
        """Move every parameter against the sign of its gradient, which is then gone.

        Offsets move by `length`; factors by so much that the outermost integer moves by 2 `length` steps of the grid: a
        hundredth of the range is nothing at 2 bits and more than a step at 8.
        """
        for parameter in (self._offset, *self._factors):
            if parameter.grad is not None:
                reach = 1.0 if parameter is self._offset else 2.0 ** (2 - self._num_bits)
                parameter.sub_(parameter.grad.sign_(), alpha=length * reach)
                parameter.grad = None
        self._offset.clamp_(-0.5, 0.5)
        for factor in self._factors:
            factor.clamp_(min=MIN_FACTOR).clamp_(max=self._largest)

    @torch.no_grad()
    def state(self) -> list[Tensor]:
        """A copy of the parameters."""
        return [parameter.clone() for parameter in (self._offset, *self._factors)]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Make the parameters those of `state`."""
        for parameter, value in zip((self._offset, *self._factors), state, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def to_integers(self) -> IntWeight:
        """What would be stored: it decodes to `weight`."""
        scale, zero = self.grid()
        values = self._integers(scale, zero).to(torch.int8).view(self._shape)
        zero_point = None if zero is None else zero.to(torch.int8)
        return IntWeight(values, scale.to(self._scale_dtype), zero_point, self._num_bits)


class _Straight(torch.autograd.Function):
    """A rounding of x that was computed aside, with the gradient of x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _straight(x: Tensor, rounded: Tensor) -> Tensor:
    result: Tensor = _Straight.apply(x, rounded)  # type: ignore[no-untyped-call]
    return result
