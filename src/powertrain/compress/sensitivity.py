"""What each layer's rounding does to the model: the KL divergence of its next-token distribution, in nats per token.

Two answers for every (unit, format). `measured`: round that unit alone, run the blocks from there on, compare.
`estimated`: its second-order expansion 1/2 dw' F dw with the diagonal of the Fisher information F, from one
backward pass for all formats: labels are drawn from the model's own prediction, and the square of each sequence's
gradient is what F's diagonal is on average (Kunstner et al. 2019, arXiv 1905.12558; HAWQ-V2, arXiv 1911.03852, weighs
layers by curvature likewise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.blockwise import TOKENS_AT_ONCE, block_of
from powertrain.compress.plain_decoder import PlainBlock
from powertrain.compress.quantize import rtn
from powertrain.model.families import ModelConfig, model_config
from powertrain.types import PowertrainError, QuantScheme

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

SHRINK_STEPS = 5
"""Ranges tried for each group: a fifth of the time of the whole search, and nearly its error."""

Losses = list[dict[QuantScheme, float]]
"""Of each unit, the divergence in each format."""

Progress = Callable[[str, float, float | None], None]


@dataclass(frozen=True, slots=True)
class Unit:
    """Matrices that get one format: those that multiply the same input, or the head. `layers` are their names."""

    layers: tuple[str, ...]
    formats: tuple[QuantScheme, ...]

    @property
    def block(self) -> int | None:
        """The block it is in; None for the head."""
        return block_of(self.layers[0])


class PlainModel:
    """A model's blocks and head in float32 on a device, loaded as they are asked for."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.config: ModelConfig = model_config(checkpoint.config)
        self.device = device
        self._checkpoint = checkpoint
        self._names = checkpoint.names()

    def load(self, name: str) -> Tensor:
        return self._checkpoint.load(name).to(self.device, torch.float32)

    def block(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block by their names within it."""
        prefix = f"model.layers.{index}."
        return {name.removeprefix(prefix): self.load(name) for name in self._names if name.startswith(prefix)}

    def head(self) -> Tensor:
        """[vocab, hidden]: the embedding where they are tied."""
        return self.load(HEAD if HEAD in self._names else EMBEDDING)

    def normed(self, x: Tensor, norm: Tensor) -> Tensor:
        """What the head multiplies, of the last block's output."""
        return PlainBlock(self.config, 0, {"norm.weight": norm}).normed(x, "norm")

    def streams(self, token_ids: Tensor) -> Iterator[Tensor]:
        """Before each block and after the last: float32 [sequences, tokens, hidden]."""
        x = self.load(EMBEDDING)[token_ids.to(self.device)]
        yield x
        for index in range(self.config.num_layers):
            block = PlainBlock(self.config, index, self.block(index))
            x = torch.cat([block(part) for part in batches(x)])
            if not bool(torch.isfinite(x).all()):
                raise PowertrainError(f"model.layers.{index}: its outputs on the calibration text are not finite")
            yield x


def batches(x: Tensor) -> tuple[Tensor, ...]:
    """Sequences [n, tokens, ..] in parts of a few thousand tokens."""
    return torch.split(x, max(1, TOKENS_AT_ONCE // x.shape[1]))


def estimated(
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    token_ids: Tensor,
    *,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
) -> Losses:
    """By the diagonal of the Fisher information. token_ids: int64 [sequences, tokens].

    In memory: the stream before every block, and of one block the weights, their gradients and the diagonal.
    """
    model = PlainModel(checkpoint, device)
    with torch.no_grad():
        streams = list(model.streams(token_ids))
    losses: Losses = [{} for _ in units]
    head_units = [at for at, unit in enumerate(units) if unit.block is None]
    gradients, information = _through_head(model, streams.pop(), seed, wants_information=bool(head_units))
    for at in head_units:
        assert information is not None
        losses[at] = _second_order(units[at], {units[at].layers[0]: model.head()}, [information], token_ids.numel())
    for done, index in enumerate(reversed(range(model.config.num_layers))):
        own = [at for at, unit in enumerate(units) if unit.block == index]
        weights = model.block(index)
        matrices = {layer: weights[_within(layer)] for at in own for layer in units[at].layers}
        gradients, diagonals = _through_block(model, index, weights, list(matrices.values()), streams.pop(), gradients)
        of_layer = dict(zip(matrices, diagonals, strict=True))
        for at in own:
            diagonal = [of_layer[layer] for layer in units[at].layers]
            losses[at] = _second_order(units[at], matrices, diagonal, token_ids.numel())
        if progress is not None:
            progress("sensitivity", done + 1, model.config.num_layers)
    return losses


def _through_head(model: PlainModel, x: Tensor, seed: int, *, wants_information: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of drawn labels' log-probability by x [sequences, tokens, hidden], and the diagonal for the head."""
    head, norm = model.head(), model.load(FINAL_NORM)
    information = torch.zeros_like(head) if wants_information else None
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.empty_like(x)
    for at, sequence in enumerate(x):
        leaf = sequence.clone().requires_grad_()
        normed = model.normed(leaf, norm)
        difference = (normed.detach() @ head.t()).softmax(dim=-1)
        sums = difference.cumsum(dim=-1)
        drawn = torch.rand(len(sums), 1, generator=generator).to(x.device) * sums[:, -1:]
        labels = torch.searchsorted(sums, drawn).clamp_(max=sums.shape[1] - 1)
        # d log p(label) / d logits = [label] - p
        difference.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.float32))
        gradients[at] = torch.autograd.grad(normed, leaf, difference @ head)[0]
        if information is not None:
            information += (difference.t() @ normed.detach()).square_()
    return gradients, information


def _through_block(
    model: PlainModel,
    index: int,
    weights: dict[str, Tensor],
    matrices: Sequence[Tensor],
    x: Tensor,
    gradients: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients by the block's input of those by its output, and the diagonals of its matrices."""
    block, found = PlainBlock(model.config, index, weights), torch.empty_like(gradients)
    diagonals = [torch.zeros_like(matrix) for matrix in matrices]
    for matrix in matrices:
        matrix.requires_grad_()
    for at in range(len(x)):
        leaf = x[at : at + 1].clone().requires_grad_()
        first, *rest = torch.autograd.grad(block(leaf), [leaf, *matrices], gradients[at : at + 1])
        found[at] = first[0]
        for diagonal, gradient in zip(diagonals, rest, strict=True):
            diagonal += gradient.square_()
    for matrix in matrices:
        matrix.requires_grad_(False)
    return found, diagonals


def _second_order(
    unit: Unit, matrices: Mapping[str, Tensor], diagonals: Sequence[Tensor], num_tokens: int
) -> dict[QuantScheme, float]:
    """Half the weighed squares of what rounding changes, per token."""
    losses = {}
    for scheme in unit.formats:
        squares = [
            (diagonal * (rounded(matrices[layer], scheme, layer) - matrices[layer]).square_()).sum(dtype=torch.float64)
            for layer, diagonal in zip(unit.layers, diagonals, strict=True)
        ]
        losses[scheme] = float(sum(squares)) / (2 * num_tokens)
    return losses


def measured(
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    token_ids: Tensor,
    *,
    device: torch.device,
    progress: Progress | None = None,
) -> Losses:
    """By rounding each unit alone, in each of its formats. token_ids: int64 [sequences, tokens].

    In memory: the whole model in float32, the stream before every block, and a float per token and vocabulary entry.
    """
    model = PlainModel(checkpoint, device)
    losses: Losses = [{} for _ in units]
    done, total = 0, sum(len(unit.formats) for unit in units)
    with torch.inference_mode():
        streams = list(model.streams(token_ids))
        judge = Judge(model, streams[-1])
        blocks = [PlainBlock(model.config, index, model.block(index)) for index in range(model.config.num_layers)]
        for at, unit in enumerate(units):
            for scheme in unit.formats:
                if unit.block is None:
                    losses[at][scheme] = judge.divergence(streams[-1], rounded(judge.head, scheme, unit.layers[0]))
                else:
                    x = _after(blocks, unit, scheme, streams[unit.block])
                    losses[at][scheme] = judge.divergence(x)
                done += 1
                if progress is not None:
                    progress("sensitivity", done, total)
    return losses


def _after(blocks: Sequence[PlainBlock], unit: Unit, scheme: QuantScheme, x: Tensor) -> Tensor:
    """The last block's output with one unit rounded; x: the input of its block."""
    assert unit.block is not None
    first = blocks[unit.block]
    changed = dict(first.weights)
    for layer in unit.layers:
        changed[_within(layer)] = rounded(changed[_within(layer)], scheme, layer)
    through = [PlainBlock(first.config, unit.block, changed), *blocks[unit.block + 1 :]]
    outputs = []
    for part in batches(x):
        for block in through:
            part = block(part)
        outputs.append(part)
    return torch.cat(outputs)


class Judge:
    """Next-token distributions of the original model, and how far others are from them."""

    def __init__(self, model: PlainModel, x: Tensor) -> None:
        """x: the original last block's output, [sequences, tokens, hidden]."""
        self.head, self._norm, self._model = model.head(), model.load(FINAL_NORM), model
        self._expected = [self._log_probabilities(part, self.head) for part in batches(x)]

    def divergence(self, x: Tensor, head: Tensor | None = None) -> float:
        """Mean KL divergence in nats of a changed last output, or of a changed head, from the original."""
        head, total = self.head if head is None else head, 0.0
        for part, expected in zip(batches(x), self._expected, strict=True):
            found = self._log_probabilities(part, head)
            total += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
        return max(0.0, total / x[..., 0].numel())

    def _log_probabilities(self, x: Tensor, head: Tensor) -> Tensor:
        return (self._model.normed(x, self._norm) @ head.t()).log_softmax(dim=-1)


def rounded(weight: Tensor, scheme: QuantScheme, name: str) -> Tensor:
    """The matrix as rounding to nearest with a short range search leaves it, float32."""
    quantized, _ = rtn(weight, scheme, observer="mse", name=name, shrink_steps=SHRINK_STEPS)
    return quantized.dequantize()


def _within(layer: str) -> str:
    """`self_attn.q_proj.weight` of `model.layers.0.self_attn.q_proj`."""
    return ".".join(layer.split(".")[3:]) + ".weight"
