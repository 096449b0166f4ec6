"""A whole model in plain torch on whole sequences: what training runs, and judges that want every layer's stream.

All weights are in memory; what goes one block at a time takes `PlainBlock` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from powertrain.checkpoint.source import Checkpoint
from powertrain.compress.blockwise import block_of
from powertrain.compress.plain_decoder import PlainBlock, Rotations, Weights, rotations
from powertrain.model.families import ModelConfig, model_config

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

POSITIONS_AT_ONCE = 1024
"""Positions whose logits exist at a time."""

T = TypeVar("T")
RunBlock = Callable[[ModelConfig, int, Weights, Rotations, torch.Tensor], torch.Tensor]


def run_block(config: ModelConfig, index: int, weights: Weights, turns: Rotations, x: torch.Tensor) -> torch.Tensor:
    """The stream x [sequences, tokens, hidden] after a block: a function of its inputs alone, so it can be compiled."""
    return PlainBlock(config, index, weights, turns)(x)


class PlainModel:
    """Embedding, blocks and final norm over a mapping of Hugging Face names to float tensors, which gradients reach.

    `run`: how a block is run (`torch.compile(run_block)`, say). `recomputes`: blocks keep no activations for the
    backward pass but run a second time in it, which costs a third of a step's time and saves most of its memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        run: RunBlock = run_block,
        recomputes: bool = False,
        turns: dict[int, Rotations] | None = None,
    ) -> None:
        """`turns`: rotations by length, which models of the same config may share."""
        self.config = config
        self.weights = weights
        self.run = run
        self.recomputes = recomputes
        self.blocks: list[dict[str, torch.Tensor]] = [{} for _ in range(config.num_layers)]
        for name, weight in weights.items():
            if (index := block_of(name)) is not None:
                self.blocks[index][name.removeprefix(f"model.layers.{index}.")] = weight
        # the first layer with the same window: one number for all layers that run the same code
        self._kinds = [config.windows.index(window) for window in config.windows]
        self._turns = {} if turns is None else turns

    @property
    def embedding(self) -> torch.Tensor:
        return self.weights[EMBEDDING]

    @property
    def head(self) -> torch.Tensor:
        """[vocab, hidden]; the embedding where the two are tied."""
        return self.weights[EMBEDDING] if self.config.ties_embeddings else self.weights[HEAD]

    def apply(self, use: Callable[[PlainModel], T]) -> T:
        """What `use` makes of the model: through here, where weights may have to be brought together first."""
        return use(self)

    def streams(self, token_ids: torch.Tensor, order: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """The stream [sequences, tokens, hidden] before the first block, then after each; token_ids: int64 [.., T].

        `order`: which blocks run, all of them if None.
        """
        x = functional.embedding(token_ids, self.embedding)
        turns = self._rotations(token_ids.shape[-1], x.device)
        yield x
        for index in range(self.config.num_layers) if order is None else order:
            x = self.through(index, x, turns)
            yield x

    def through(self, index: int, x: torch.Tensor, turns: Rotations | None = None) -> torch.Tensor:
        """The stream after one block."""
        turns = turns or self._rotations(x.shape[1], x.device)
        inputs = (self.config, self._kinds[index], self.blocks[index], turns, x)
        if self.recomputes and torch.is_grad_enabled():
            result: torch.Tensor = recomputed(self.run, *inputs, use_reentrant=False)
            return result
        return self.run(*inputs)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """What the head multiplies."""
        return functional.rms_norm(x, x.shape[-1:], self.weights[FINAL_NORM], self.config.rms_norm_eps)

    def hidden(self, token_ids: torch.Tensor, order: Sequence[int] | None = None) -> torch.Tensor:
        """[sequences, tokens, hidden] after the final norm."""
        last = None
        for x in self.streams(token_ids, order):
            last = x
        assert last is not None
        return self.normed(last)

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[sequences, tokens, vocab], all at once: for few tokens."""
        return functional.linear(self.hidden(token_ids), self.head)

    def _rotations(self, num_tokens: int, device: torch.device) -> Rotations:
        if num_tokens not in self._turns:
            self._turns[num_tokens] = rotations(self.config, num_tokens, device)
        return self._turns[num_tokens]


@torch.no_grad()
def mean_kl(
    reference: torch.Tensor,
    reference_head: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    at_once: int = POSITIONS_AT_ONCE,
) -> torch.Tensor:
    """Mean KL(reference || other) of next-token distributions, nats per position, from what the heads multiply.

    reference, hidden: [.., width]; the heads: [vocab, width]. Logits of `at_once` positions exist at a time.
    """
    reference, hidden = reference.flatten(0, -2), hidden.flatten(0, -2)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for target, own in zip(torch.split(reference, at_once), torch.split(hidden, at_once), strict=True):
        log_p = torch.log_softmax(functional.linear(target, reference_head).float(), dim=-1)
        log_q = torch.log_softmax(functional.linear(own, head).float(), dim=-1)
        total += functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total / len(hidden)


def load_weights(
    checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """All of a float model's tensors; a head tied to the embedding is left out where a file holds it twice.

    dtype: None leaves each in the type of the file, which a CPU need not copy.
    """
    config = model_config(checkpoint.config)
    names = [name for name in checkpoint.names() if not (config.ties_embeddings and name == HEAD)]
    return {name: checkpoint.load(name).to(device=device, dtype=dtype) for name in names}


def load_plain_model(checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype | None) -> PlainModel:
    """A float checkpoint as a frozen model; dtype: None is the file's.

    Raises `ModelFileError` for a family that does not run here.
    """
    return PlainModel(model_config(checkpoint.config), load_weights(checkpoint, device, dtype))


def in_dtype(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights as another float type, gradients passing back to these."""
    return {name: weight.to(dtype) for name, weight in weights.items()}
