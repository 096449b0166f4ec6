"""What holds a decode step at batch 1: its layers and its head, with the weights from memory and from the cache.

The same step runs once on the model and once on its first layer repeated, whose weights stay in the last cache: what
is left there is arithmetic and the threads' meetings, and the difference is waiting for memory. Turns alternate.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import numpy as np
import torch
from common import parser, write

from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.load import load_decoder
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import EngineConfig, physical_cores, resolve
from powertrain.kernels.attention import AttentionStep
from powertrain.measure import record
from powertrain.measure.roofline import read_bandwidth
from powertrain.model.native_decoder import NativeDecoder
from powertrain.types import PowertrainError

BLOCK_SIZE = 16


def main() -> None:
    arguments = parser(__doc__, "native_step_parts.json")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--threads", type=int, default=physical_cores())
    arguments.add_argument("--context", type=int, default=160)
    arguments.add_argument("--turns", type=int, default=15)
    given = arguments.parse_args()
    options = EngineConfig.from_options(device="cpu", kernels="native", threads=given.threads)
    config = resolve(options, has_cuda=False, model_dtype="float32")
    decoder = load_decoder(open_checkpoint(resolve_model(given.model)), config)
    if not isinstance(decoder, NativeDecoder):
        raise PowertrainError("this measures the native kernels, and they do not run here")
    torch.set_num_threads(1)
    bandwidth = read_bandwidth("cpu")
    cached = copy.copy(decoder)
    cached.blocks = [decoder.blocks[0]] * len(decoder.blocks)
    cached._native = cached._build()
    times: dict[str, list[tuple[float, float]]] = {"from memory": [], "layers from the cache": []}
    for _ in range(given.turns):
        for name, model in zip(times, (decoder, cached), strict=True):
            times[name] += _steps(model, given.context, 20)
    head_bytes = decoder.head.step_bytes()
    parts: dict[str, Any] = {}
    for name, steps in times.items():
        layers, head = zip(*steps, strict=True)
        parts[name] = {"layers": _spread(layers), "head": _spread(head)}
        for part, spread in parts[name].items():
            print(f"{name:<22} {part:<7} median {spread['median_ms']:.2f} ms, quarter below {spread['quarter_ms']:.2f}")
    made = record.new_record(
        "native_step_parts",
        git=given.git,
        model=given.model,
        threads=given.threads,
        context=given.context,
        read_bytes_per_s=bandwidth,
        layer_bytes=decoder.step_bytes() - head_bytes,
        head_bytes=head_bytes,
        parts=parts,
    )
    write(given.json, made)


def _steps(model: NativeDecoder, context: int, count: int) -> list[tuple[float, float]]:
    """Seconds of the layers and of the head with its top-1, `count` times."""
    width = -(-context // BLOCK_SIZE) + 1
    cache, tables = model.new_cache(width, BLOCK_SIZE), np.arange(width, dtype=np.int64).reshape(1, width)
    device, ids = torch.device("cpu"), torch.arange(context) % model.config.vocab_size
    model.forward(ids, AttentionStep([context], [context], tables, BLOCK_SIZE, device), cache)
    step = AttentionStep([1], [context + 1], tables, BLOCK_SIZE, device)
    found = []
    for _ in range(count):
        start = time.perf_counter()
        hidden = model.forward(ids[:1], step, cache)
        between = time.perf_counter()
        model.top_logits(hidden, 1)
        found.append((between - start, time.perf_counter() - between))
    return found


def _spread(seconds: tuple[float, ...]) -> dict[str, float]:
    quarter, median, _ = statistics.quantiles(seconds, n=4)
    return {"least_ms": 1e3 * min(seconds), "quarter_ms": 1e3 * quarter, "median_ms": 1e3 * median}


if __name__ == "__main__":
    main()
