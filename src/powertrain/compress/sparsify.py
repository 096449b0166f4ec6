"""Masks: single weights set to zero, for study. Zeros are stored and multiplied like any number: nothing runs faster.

Magnitude; Wanda (Sun et al. 2023, arXiv 2306.11695), |w| times the norm of its input, compared within a row; SparseGPT
(Frantar and Alistarh 2023, arXiv 2301.00774), which also moves the weights that stay so that outputs change least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.blockwise import CalibratedWalk, block_of, names_by_block
from powertrain.compress.gptq import GptqOptions, Moments
from powertrain.compress.model_step import CheckpointView, StepContext, shapes_of
from powertrain.compress.plain_decoder import LINEARS_OF_STEP
from powertrain.compress.plain_model import EMBEDDING
from powertrain.compress.recipe_fields import one_of, refuse_unknown_keys
from powertrain.model.families import model_config
from powertrain.types import PowertrainError

KINDS = ("magnitude", "wanda", "sparsegpt")
COLUMNS_AT_ONCE = 128
"""Columns of which SparseGPT chooses together, and whose errors then reach the rest by one product."""

MATRICES = frozenset(name for names in LINEARS_OF_STEP.values() for name in names)


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which weights may go: a `share` of them anywhere, or all but `num_kept` of every `group` neighbours in a row."""

    share: float
    num_kept: int | None = None
    group: int | None = None

    @classmethod
    def parse(cls, value: Any, where: str) -> Pattern:
        """0.5, or "2:4" for two of four that stay."""
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
            return cls(float(value))
        parts = str(value).split(":")
        if len(parts) == 2 and all(part.isdecimal() for part in parts) and 0 < int(parts[0]) < int(parts[1]):
            return cls(1 - int(parts[0]) / int(parts[1]), int(parts[0]), int(parts[1]))
        raise PowertrainError(f"{where} must be a share of zeros like 0.5, or kept:group like 2:4; got {value!r}")

    def __str__(self) -> str:
        return f"{self.share:g}" if self.group is None else f"{self.num_kept}:{self.group}"

    def check(self, in_features: int, name: str) -> None:
        if self.group is not None and in_features % self.group:
            raise PowertrainError(f"{name}: groups of {self.group} do not divide its {in_features} inputs")

    def zeros(self, scores: torch.Tensor) -> torch.Tensor:
        """Bool, like scores [rows, columns]: the lowest scores of each group, or of the whole; of equals the first."""
        groups = scores.flatten().unsqueeze(0) if self.group is None else scores.reshape(-1, self.group)
        num_zeros = round(self.share * groups.shape[1])
        lowest = groups.argsort(dim=1, stable=True)[:, :num_zeros]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True).view_as(scores)


def magnitude(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The matrix [out, in] with its smallest weights set to zero."""
    return weight.masked_fill(pattern.zeros(weight.abs()), 0.0)


def wanda(weight: torch.Tensor, moments: Moments, pattern: Pattern) -> torch.Tensor:
    """The matrix [out, in] with those zero in each row whose |w| times their input's norm is least."""
    scores = weight.abs() * moments.hessian.diagonal().sqrt().to(weight)
    if pattern.group is not None:
        return weight.masked_fill(pattern.zeros(scores), 0.0)
    num_zeros = round(pattern.share * weight.shape[1])
    lowest = scores.argsort(dim=1, stable=True)[:, :num_zeros]
    return weight.scatter(1, lowest, 0.0)


def sparsegpt(weight: torch.Tensor, moments: Moments, pattern: Pattern, *, name: str = "weight") -> torch.Tensor:
    """The matrix [out, in] with weights zeroed one column at a time, those after it making up for the error.

    What a zero costs at the outputs is w^2 / U_jj^2, with U^T U the inverse of the inputs' second moments: the least
    go, of 128 columns together, or of each group. Raises `PowertrainError` as `gptq` does.
    """
    options = GptqOptions(orders_columns=False)
    _, is_dead, upper, _ = moments.factors(options, name)
    columns = torch.where(is_dead, 0.0, weight.float()).t().contiguous()  # [in, out]
    costs = upper.diagonal().square().unsqueeze(1)
    for begin in range(0, len(columns), _step(pattern)):
        end = min(begin + _step(pattern), len(columns))
        block, errors = columns[begin:end], torch.zeros_like(columns[begin:end])
        gone = torch.empty_like(block, dtype=torch.bool)
        chosen_together = pattern.group or end - begin
        for at in range(end - begin):
            if at % chosen_together == 0:
                some = slice(at, at + chosen_together)
                gone[some] = pattern.zeros((block[some].square() / costs[begin:end][some]).t()).t()
            row = upper[begin + at, begin + at : end]
            errors[at] = torch.where(gone[at], block[at], 0.0) / row[0]
            block[at].masked_fill_(gone[at], 0.0)
            block[at + 1 :].addr_(row[1:], errors[at], alpha=-1.0)
        columns[end:].addmm_(upper[begin:end, end:].t(), errors, alpha=-1.0)
    return columns.t().contiguous()


def _step(pattern: Pattern) -> int:
    """Columns at once: a multiple of the group."""
    return COLUMNS_AT_ONCE if pattern.group is None else max(1, COLUMNS_AT_ONCE // pattern.group) * pattern.group


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsifyStep:
    """`{method: sparsify, kind: wanda, pattern: "2:4"}`: zeros in all matrices of all blocks; the head stays whole."""

    kind: str
    pattern: Pattern

    @classmethod
    def parse(cls, entries: Mapping[str, Any], where: str) -> SparsifyStep:
        refuse_unknown_keys(entries, ("kind", "pattern"), where)
        kind = one_of(entries.get("kind", "wanda"), KINDS, f"{where}.kind")
        return cls(kind=kind, pattern=Pattern.parse(entries.get("pattern", 0.5), f"{where}.pattern"))

    @property
    def is_calibrated(self) -> bool:
        return self.kind != "magnitude"

    def to_dict(self) -> dict[str, Any]:
        pattern = self.pattern.share if self.pattern.group is None else str(self.pattern)
        return {"method": "sparsify", "kind": self.kind, "pattern": pattern}

    def outline(self, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        for layer, (_, in_features) in model_config(checkpoint.config).linear_shapes().items():
            self.pattern.check(in_features, layer)
        return checkpoint, [f"sparsify ({self.kind}, {self.pattern}): zeros are stored, and serve no faster"]

    def apply(self, checkpoint: Checkpoint, context: StepContext) -> Checkpoint:
        sparse = _Sparse(checkpoint, self, context)
        return CheckpointView(checkpoint, shapes_of(checkpoint), sparse.load)


class _Sparse:
    """Blocks with zeros, made one after the other as they are asked for; each sees what those before it give.

    Only the last one is kept. Asked for an earlier one, the walk begins anew.
    """

    def __init__(self, source: Checkpoint, step: SparsifyStep, context: StepContext) -> None:
        self._source, self._step, self._context = source, step, context
        _, self._blocks, _ = names_by_block(source.names())
        self._config = model_config(source.config)
        self._walk: CalibratedWalk | None = None
        self._index = -1
        self._current: dict[str, torch.Tensor] = {}

    def load(self, name: str) -> torch.Tensor:
        block = block_of(name)
        matrix = name.removeprefix(f"model.layers.{block}.").removesuffix(".weight")
        if block is None or matrix not in MATRICES:
            return self._source.load(name)
        if not self._step.is_calibrated:
            return magnitude(self._source.load(name).float(), self._step.pattern)
        if block < self._index:
            self._index, self._walk = -1, None
        while self._index < block:
            self._advance()
        return self._current[matrix].cpu()

    def _advance(self) -> None:
        context, step = self._context, self._step
        assert context.calibration is not None
        if self._walk is None:
            embedding = self._source.load(EMBEDDING).to(context.device)
            ids = context.calibration.token_ids
            self._walk = CalibratedWalk(self._config, embedding, ids, keeps_original=False)
        self._index += 1
        prefix = f"model.layers.{self._index}."
        names = self._blocks[self._index]
        weights = {name.removeprefix(prefix): self._source.load(name).to(context.device).float() for name in names}
        self._current = {}

        def compress(name: str, weight: torch.Tensor, moments: Moments) -> torch.Tensor:
            if step.kind == "wanda":
                self._current[name] = wanda(weight, moments, step.pattern)
            else:
                self._current[name] = sparsegpt(weight, moments, step.pattern, name=prefix + name)
            return self._current[name]

        self._walk.through(self._index, weights, set(MATRICES), compress)
        if context.progress is not None:
            context.progress("sparsify", self._index + 1, len(self._blocks))
