"""GPTQ: rounding one column at a time, the error of each made up for by those not yet rounded.

Frantar et al. 2022 (arXiv 2210.17323). The squared error of a layer's *output* is a quadratic form of its weights'
error with the inputs' second moments H = X X^T as the matrix; each column is rounded and its error spread over the
later columns as that form says. Columns go in the order of falling H_ii (activation order), groups and their scales
are those of the original order and fixed before ("static"), so that no index of columns has to be stored.

Asymmetric correction is that of GPTAQ (Li et al. 2025, arXiv 2504.02692): the target is what the layer gave for the
inputs of the model before compression, though it now sees those of the compressed blocks before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from powertrain.compress.quantize import weight_error
from powertrain.compress.ranges import Observer, choose_range
from powertrain.model.weights import IntWeight
from powertrain.types import PowertrainError, QuantScheme

Nearest = Callable[[int, torch.Tensor], torch.Tensor]
"""(number of an input, its weights float32 [out]) -> the same on their grids."""

COLUMNS_AT_ONCE = 128
"""Columns whose errors reach the rest of the matrix by one product."""

MAX_DAMPING = 1.0

GRAM_COLUMNS = 384
"""X X^T is symmetric: of its blocks of so many columns only those on and above the diagonal are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqOptions:
    """`damping_frac`: of H's mean diagonal, added to it; raised tenfold while H is not positive definite.

    `orders_columns`: by activation, largest first. `correction`: the share of the asymmetric correction that is
    applied where the moments know the inputs before compression (0.25 as its authors' code). `observer` as in `rtn`.
    """

    damping_frac: float = 0.01
    orders_columns: bool = True
    correction: float = 0.25
    observer: Observer = "mse"


@dataclass(slots=True)
class Moments:
    """What is kept of a layer's inputs x over calibration tokens; sums in float64.

    hessian: [in, in], of x x^T, or [0, 0] where only sizes are wanted, which cost next to nothing;
    shift: [in, in], of (x' - x) x^T where x' is the input before compression, or None.
    size_sum: float64 [in], of |x|; size_max: float32 [in], the largest |x|.
    """

    hessian: torch.Tensor
    shift: torch.Tensor | None
    size_sum: torch.Tensor
    size_max: torch.Tensor
    num_tokens: int = 0
    _factors: dict[tuple[float, bool], Factors] = field(default_factory=dict)

    @classmethod
    def zeros(cls, width: int, device: torch.device, *, has_shift: bool = False, has_hessian: bool = True) -> Moments:
        rows = width if has_hessian else 0
        hessian = torch.zeros(rows, rows, dtype=torch.float64, device=device)
        shift = torch.zeros_like(hessian) if has_shift and has_hessian else None
        sums = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(hessian, shift, sums, torch.zeros(width, device=device))

    def add(self, x: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Count inputs [.., in]; `original`: what they were before compression."""
        x = x.reshape(-1, x.shape[-1]).float()
        if self.hessian.numel():
            self.hessian += _gram(x)  # float32 within a batch, float64 over all
        sizes = x.abs()
        self.size_sum += sizes.sum(0)
        torch.maximum(self.size_max, sizes.amax(0), out=self.size_max)
        if self.shift is not None and original is not None:
            self.shift += (original.reshape(x.shape).float() - x).t() @ x
        self.num_tokens += x.shape[0]

    def factors(self, options: GptqOptions, name: str) -> Factors:
        """What rounding needs of the moments: made once for all matrices that share the input."""
        key = (options.damping_frac, options.orders_columns)
        if key not in self._factors:
            self._factors[key] = _factors(self, options, name)
        return self._factors[key]


def _gram(x: torch.Tensor) -> torch.Tensor:
    """x^T x of x [tokens, in]."""
    gram = x.new_empty(x.shape[1], x.shape[1])
    for begin in range(0, len(gram), GRAM_COLUMNS):
        end = begin + GRAM_COLUMNS
        gram[begin:end, begin:] = x[:, begin:end].t() @ x[:, begin:]
        gram[end:, begin:end] = gram[begin:end, end:].t()
    return gram


class Factors(NamedTuple):
    """order: int64 [in], the columns as they are rounded; is_dead: bool [in], inputs that are always zero.

    upper: float32 [in, in] in that order, upper triangular with U^T U = (H + damping)^-1; shift: GPTAQ's P or None.
    """

    order: torch.Tensor
    is_dead: torch.Tensor
    upper: torch.Tensor
    shift: torch.Tensor | None


def gptq(
    weight: torch.Tensor,
    scheme: QuantScheme,
    moments: Moments,
    options: GptqOptions | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> tuple[IntWeight, float]:
    """Round a float matrix [out, in] onto the grids that `rtn` would choose, so that its outputs change least.

    Returns the integers and the normalised squared weight error, as `rtn` does (larger than that of `rtn`: it is
    the outputs' that is small). Raises `PowertrainError` naming `name` for a matrix or moments that are not finite,
    no calibration tokens, or moments that no damping makes positive definite.
    """
    options = options or GptqOptions()
    out_features, in_features = weight.shape
    target = weight.to(torch.float32)
    group_size = scheme.group_size or in_features
    groups = target.view(out_features, -1, group_size)
    importance = None
    if options.observer == "weighted":
        importance = _importance(moments, options, name).view(-1, group_size)
    scale, zero_point = choose_range(
        groups,
        scheme.num_bits,
        scheme.symmetric,
        options.observer,
        scale_dtype,
        name,
        importance=importance,
    )
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point
    low, high = -(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1) - 1
    own_scale, own_zero = (part.t().repeat_interleave(group_size, 0) for part in (scale, zeros))

    def nearest(index: int, column: torch.Tensor) -> torch.Tensor:
        s, z = own_scale[index], own_zero[index]
        return torch.round(column / s).add_(z).clamp_(low, high).sub_(z).mul_(s)

    rounded = rounded_matrix(target, nearest, moments, options, name)
    values = torch.round(rounded / own_scale.t()).add_(own_zero.t()).to(torch.int8)
    zero = None if zero_point is None else zero_point.to(torch.int8)
    quantized = IntWeight(values, scale.to(scale_dtype), zero, scheme.num_bits)
    return quantized, weight_error(target, quantized.dequantize())


def rounded_matrix(
    weight: torch.Tensor, nearest: Nearest, moments: Moments, options: GptqOptions, name: str
) -> torch.Tensor:
    """weight float32 [out, in] on the grids that `nearest` knows, so that its outputs change least.

    Raises `PowertrainError` naming `name` for moments that are not finite, of no tokens, or that no damping makes
    positive definite.
    """
    _check(moments, name)
    order, is_dead, upper, shift = moments.factors(options, name)
    # columns as rows: each is contiguous then
    columns = torch.where(is_dead, 0.0, weight).t()[order]
    correction = None if shift is None else options.correction * shift
    indices = order.tolist()
    rounded = torch.empty_like(weight)
    rounded[:, order] = _round_columns(columns, lambda at, column: nearest(indices[at], column), upper, correction).t()
    return rounded


def _importance(moments: Moments, options: GptqOptions, name: str) -> torch.Tensor:
    """float32 [in], mean 1: what an error of each column costs once those after it have made up for it as they can.

    That is 1 / U_jj^2, the loss of optimal brain quantization (Hassibi and Stork 1993; Frantar et al. 2022).
    """
    _check(moments, name)
    factors = moments.factors(options, name)
    importance = torch.empty_like(factors.upper[0])
    importance[factors.order] = factors.upper.diagonal().square().reciprocal()
    return importance / importance.mean()


def _check(moments: Moments, name: str) -> None:
    if moments.num_tokens == 0:
        raise PowertrainError(f"{name}: gptq needs calibration tokens, there are none")
    if not bool(torch.isfinite(moments.hessian).all()):
        raise PowertrainError(f"{name}: its inputs hold NaN or infinity on the calibration text")


def _factors(moments: Moments, options: GptqOptions, name: str) -> Factors:
    hessian = moments.hessian / moments.num_tokens
    is_dead = hessian.diagonal() == 0
    hessian = hessian + torch.diag(is_dead.to(hessian.dtype))
    order = torch.arange(len(hessian), device=hessian.device)
    if options.orders_columns:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = _inverse_factor(hessian[order][:, order], options.damping_frac, name)
    shift = None
    if moments.shift is not None:
        shift = _correction((moments.shift / moments.num_tokens)[order][:, order], upper).float()
    return Factors(order, is_dead, upper.float(), shift)


def _inverse_factor(hessian: torch.Tensor, damping_frac: float, name: str) -> torch.Tensor:
    """U float64, upper triangular with U^T U = (H + damping)^-1.

    With both axes turned around, Cholesky's lower factor is an upper one R with R R^T = H, and U is its inverse.
    """
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    while damping_frac <= MAX_DAMPING:
        damped = hessian + identity * (damping_frac * mean)
        factor, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            inverse: torch.Tensor = torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)
            return inverse
        damping_frac *= 10
    raise PowertrainError(f"{name}: the inputs' second moments are not positive definite; give more calibration text")


def _correction(shift: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """GPTAQ's P, strictly upper triangular [in, in]: column j of the weights moves the later ones by w_j P_j.

    P = ((D U^T) with its strictly upper part kept) U, D being the shift of the inputs.
    """
    return (shift @ upper.t()).triu(1) @ upper


def _round_columns(
    columns: torch.Tensor, nearest: Nearest, upper: torch.Tensor, shift: torch.Tensor | None
) -> torch.Tensor:
    """Columns [in, out], float32, put on their grids one after the other."""
    columns = columns.contiguous()
    rounded = torch.empty_like(columns)
    for begin in range(0, len(columns), COLUMNS_AT_ONCE):
        end = min(begin + COLUMNS_AT_ONCE, len(columns))
        block, errors, unrounded = columns[begin:end], torch.empty_like(columns[begin:end]), None
        if shift is not None:
            unrounded = torch.empty_like(block)
        for at in range(end - begin):
            column, row = block[at], upper[begin + at, begin + at : end]
            rounded[begin + at] = nearest(begin + at, column)
            torch.sub(column, rounded[begin + at], out=errors[at])
            errors[at] /= row[0]
            if unrounded is not None and shift is not None:
                unrounded[at] = column
                block[at + 1 :].addr_(shift[begin + at, begin + at + 1 : end], unrounded[at])
            block[at + 1 :].addr_(row[1:], errors[at], alpha=-1.0)
        columns[end:].addmm_(upper[begin:end, end:].t(), errors, alpha=-1.0)
        if unrounded is not None and shift is not None:
            columns[end:].addmm_(shift[begin:end, end:].t(), unrounded)
    return rounded
