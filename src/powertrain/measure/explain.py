"""`explain`: who runs each op of a model's steps on this machine, and why not the providers before it.

It starts the engine and computes a prompt chunk and a few decode steps on the engine's own cache, op by op where the
engine would replay a graph, and notes the choices. Runs with torch, numpy and the standard library alone.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from powertrain.config import NATIVE_BLOCK_SIZE, EngineConfig
from powertrain.engine.core import Engine
from powertrain.kernels import gpu_provider, native
from powertrain.kernels.attention import AttentionStep
from powertrain.kernels.op import Choices, recorded_choices
from powertrain.measure import record
from powertrain.measure.bench import Format, check_format, start_engine
from powertrain.model.decoder import Decoder
from powertrain.model.packed import GGUF_FLOATS, GGUF_GRIDS
from powertrain.model.weights import Dense, Int4Group, WeightFormat

PROMPT_TOKENS = 128
DECODE_ROWS = (1, 8, 64)

WIDTH = 100
COLUMNS = (("op", 21), ("shapes", 23), ("provider", 9), ("why not the ones before", 44))


def explain(
    model: str | Path, config: EngineConfig, *, random_weights: bool = False, format: Format = "none"
) -> dict[str, Any]:
    """The JSON record of kind "explain" for `model` on an engine as `config` asks for; see `text` for people.

    `random_weights` and `format` are those of `bench_engine`. Raises `PowertrainError` where the engine does not start.
    """
    check_format(format, random_weights)
    engine, _ = start_engine(model, config, random_weights, format)
    try:
        return record.new_record(
            "explain",
            model=engine.info.model,
            runs_on=engine.info.device,
            dtype=engine.info.dtype,
            kernels=engine.info.kernels,
            phases=[
                {"phase": name, "ops": [asdict(choice) for choice in _choices(engine, lens, contexts).values()]}
                for name, lens, contexts in _phases(engine)
            ],
            notes=_notes(engine.model),
            formats=_formats(engine.model),
            kv_cache_dtype=engine.model.kv_cache_dtype,
            advice=_advice(engine.model, config),
        )
    finally:
        engine.close()


def _phases(engine: Engine) -> Iterator[tuple[str, list[int], list[int]]]:
    """Name, tokens and context of each sequence, as far as the pool holds them: a block for each that decodes."""
    info = engine.info
    capacity = min(info.num_blocks * info.block_size, info.max_model_len)
    tokens = min(PROMPT_TOKENS, engine.config.scheduler.max_num_batched_tokens, capacity)
    yield "prefill", [tokens], [tokens]
    context = min(info.block_size, info.max_model_len)
    most = min(info.num_blocks, info.max_num_seqs)
    for rows in sorted({min(rows, most) for rows in DECODE_ROWS}):
        yield f"decode {rows}", [1] * rows, [context] * rows


def _choices(engine: Engine, lens: list[int], contexts: list[int]) -> Choices:
    """Compute one step over the cache's first blocks, with a row of logits for each sequence."""
    model, block_size = engine.model, engine.info.block_size
    width = -(-max(contexts) // block_size)
    tables = np.arange(len(lens) * width).reshape(len(lens), width)
    step = AttentionStep(lens, contexts, tables, block_size, model.device)
    with recorded_choices() as choices:
        hidden = model.forward(
            torch.zeros(sum(lens), dtype=torch.int64, device=model.device), step, engine.runner.cache
        )
        model.logits(hidden[-len(lens) :])
    return choices


def _weights(model: Decoder) -> list[WeightFormat]:
    return [weight for linear in model.linears() for weight in linear.formats]


def _formats(model: Decoder) -> dict[str, int]:
    """How many matrices the model multiplies by in each format."""
    return dict(Counter(weight.name for weight in _weights(model)))


def _notes(model: Decoder) -> list[str]:
    """What runs that is no op, and so not in the table."""
    if model.kernels == "native":
        stored = ", ".join((*GGUF_GRIDS, *GGUF_FLOATS))
        return [
            "a step is one call of the native module and its logits another: no op is chosen one by one",
            f"run as stored: {stored} and compressed-tensors' integers; other formats become float32",
        ]
    if model.device.type == "cpu":
        has_dense = any(isinstance(weight, Dense) for weight in _weights(model))
        return ["products of dense matrices are torch's own on a CPU, not an op"] if has_dense else []
    if model.kernels == "triton" and gpu_provider.unsupported() is None:
        return ["a decode step's inputs and its draw of tokens are Triton kernels without a reference, not ops"]
    return []


def _advice(model: Decoder, config: EngineConfig) -> str | None:
    """Where the reference runs although this machine has something faster, or might have: what to change."""
    if model.device.type != "cpu":
        return _gpu_advice(model)
    if model.kernels == "native":
        return None
    obstacle = native.unavailable()
    if obstacle is not None:
        return f"no native kernels: {obstacle}"
    from powertrain.model.native_decoder import why_not

    obstacle = why_not(model.config)
    if obstacle is not None:
        return f"the native kernels do not run this model: {obstacle}"
    changes = []
    if config.kernels == "reference":
        changes.append("leave --kernels out")
    if config.dtype != "auto":
        changes.append("leave --dtype out")
    if config.cache.block_size % NATIVE_BLOCK_SIZE:
        changes.append(f"make --block-size a multiple of {NATIVE_BLOCK_SIZE}")
    if config.cache.kv_cache_dtype == "fp8":
        changes.append("take --kv-cache-dtype int8 instead of fp8")
    return f"{' and '.join(changes)}: the faster native kernels run here ({native.describe()})"


def _gpu_advice(model: Decoder) -> str | None:
    reason = gpu_provider.unsupported()
    if reason is not None:
        return f"{reason}: install it for the Triton kernels"
    if model.kernels == "reference":
        return "leave --kernels out: the Triton kernels run here"
    if any(isinstance(weight, Int4Group) for weight in _weights(model)):
        return (
            "4-bit groups of no multiple of 32 inputs are dequantized for each product: compress with --group-size 64"
        )
    return None


def text(made: dict[str, Any]) -> str:
    """The record for a terminal of 100 columns."""
    lines = _wrapped(f"{made['model']}: {made['dtype']} on {made['runs_on']}, {made['kernels']}")
    phases = [phase for phase in made["phases"] if phase["ops"]]
    if phases:
        lines += ["", _row([name for name, _ in COLUMNS])]
    for phase in phases:
        lines.append(phase["phase"])
        for choice in phase["ops"]:
            lines += _cells(choice)
    lines += [""] if phases else []
    for note in made["notes"]:
        lines += _wrapped(note)
    formats = ", ".join(f"{count} x {name}" for name, count in made["formats"].items())
    lines += _wrapped(f"weights: {formats} matrices; KV cache: {made['kv_cache_dtype']}")
    return "\n".join(lines + (_wrapped(f"faster: {made['advice']}") if made["advice"] else []))


def _cells(choice: dict[str, Any]) -> Iterator[str]:
    """One choice in as many lines as it takes."""
    shapes = ", ".join(shape.split()[0] for shape in choice["shapes"])
    cells = (f"  {choice['op']}", shapes, choice["provider"], "; ".join(choice["refusals"]))
    wrapped = [
        textwrap.wrap(cell, width, drop_whitespace=True) for cell, (_, width) in zip(cells, COLUMNS, strict=True)
    ]
    wrapped[0] = [cells[0]]
    for line in zip_longest(*wrapped, fillvalue=""):
        yield _row(line)


def _row(cells: Sequence[str]) -> str:
    return " ".join(cell.ljust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)).rstrip()


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
