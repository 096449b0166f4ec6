"""How much memory a compression takes at its worst, from shapes alone: one block, the embedding and the activations.

Counted is what is held at once where most is; the files, which are mapped and whose pages the system can drop, are not,
nor what Python and torch take for themselves (a third of a gigabyte).
"""

from __future__ import annotations

import math

from powertrain.compress.blockwise import TOKENS_AT_ONCE, block_of
from powertrain.compress.plan import EMBEDDING, CompressionPlan, LayerPlan

FLOAT = 4
COPIES_TO_READ = 3
"""Float32 copies of the embedding while a GGUF file's blocks become floats; from floats to what is stored takes two."""

COPIES_TO_ROUND = 6
"""Float32 copies of a matrix that rounding it makes: ranges that are tried, errors, integers, what they stand for."""

COPIES_FOR_GPTQ = 7
"""The same with columns in order, their scales and what is left of them."""

COPIES_OF_HESSIAN = 8
"""Float64 [in, in] while a Hessian is inverted: ordered, damped, factored, solved."""


def memory_needed(plan: CompressionPlan, num_tokens: int) -> int:
    """Bytes at the worst moment; num_tokens: of the calibration text, which counts where a step is calibrated.

    Model steps (rotations, AWQ, pruning) add their own, which is of the size of a block and its activations too.
    """
    streams = _streams(plan, num_tokens) if plan.recipe.is_calibrated else 0
    table = math.prod(plan.dense.get(f"{EMBEDDING}.weight", (0,))) * FLOAT * COPIES_TO_READ
    heads = [layer for layer in plan.layers if block_of(layer.name) is None]
    head = max((_rounding(layer) + FLOAT * math.prod(layer.shape) for layer in heads), default=0)
    return streams + max(table, head, _block(plan))


def memory_line(plan: CompressionPlan, num_tokens: int) -> str:
    """The same for people."""
    text = f"at most about {memory_needed(plan, num_tokens) / 1e6:,.0f} MB of memory beside Python's own"
    if plan.recipe.is_calibrated:
        text += f", with {num_tokens:,} tokens of calibration text"
    more = ", and what the steps before rounding take" if plan.recipe.model_steps else ""
    return f"{text}{more}; more layers take no more"


def _block(plan: CompressionPlan) -> int:
    """The largest block as floats, what is stored of it, and the work on its largest matrix."""
    of_block: dict[int | None, list[LayerPlan]] = {}
    for layer in plan.layers:
        of_block.setdefault(block_of(layer.name), []).append(layer)
    worst = 0
    for index, layers in of_block.items():
        if index is not None:
            stored = sum(layer.nbytes + layer.parameter_bytes(plan.dtype.itemsize) for layer in layers)
            floats = FLOAT * sum(math.prod(layer.shape) for layer in layers)
            worst = max(worst, floats + stored + max(map(_rounding, layers)))
    return worst


def _rounding(layer: LayerPlan) -> int:
    out_features, in_features = layer.shape
    weights = FLOAT * out_features * in_features
    if layer.step.method != "gptq":
        return COPIES_TO_ROUND * weights
    return COPIES_FOR_GPTQ * weights + COPIES_OF_HESSIAN * 8 * in_features**2


def _streams(plan: CompressionPlan, num_tokens: int) -> int:
    """The stream between blocks and what follows it, and what the middle of a half makes of all tokens."""
    config = plan.config
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    kept = 2 if any(layer.step.wants_original for layer in plan.layers) else 1
    at_once = min(num_tokens, TOKENS_AT_ONCE)
    return FLOAT * (kept * num_tokens * (2 * hidden + inner) + at_once * (2 * hidden + 3 * inner))
