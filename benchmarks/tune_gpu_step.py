"""Choose the launch settings of few rows' products where they run: in decode steps of a model's first layers.

Measured alone (`tune_gpu.py`) a product finds an idle GPU. In a step its programs take their places while those of the
kernel before still run, and what they ask for ahead competes with that. So each product's candidates take turns in a
captured step, the largest product first, and the fastest stays. Random weights, contexts of `--context` tokens; the
entries go to the table that the kernels read.

    python benchmarks/tune_gpu_step.py --shape llama-3.1-8b --format int4 --rows 16,32
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from tune_gpu import Config, Problem, candidates, problems

from powertrain.checkpoint.load import random_decoder
from powertrain.config import EngineConfig, resolve
from powertrain.engine.graph import DeviceState, RowInputs, decode_step
from powertrain.kernels.gpu import tuned_table
from powertrain.measure.bench import FORMATS
from powertrain.model.decoder import Decoder, KVCache

SHAPES = Path(__file__).resolve().parent / "shapes"
PRODUCTS = {"none": "dense_linear", "int4": "int4", "fp8": "fp8", "int8": "int8"}
SIZES = {16: (1, 8)}
"""Sequences of the steps that judge an entry, where they are not its number of rows."""
GAIN = 0.998
"""A candidate wins with less than this part of the best time: replays differ by as much."""
REPLAYS, ROUNDS = 4, 4


class Steps:
    """Decode steps of a few layers, timed as graphs."""

    def __init__(self, model: Decoder, sizes: tuple[int, ...], context: int) -> None:
        self.model, self.sizes, self.context = model, sizes, context
        width = -(-context // 16) + 1
        self.cache: KVCache = model.new_cache(max(sizes) * width + 1, 16)
        self.state = DeviceState.empty(max(sizes), width, model.config.vocab_size, model.device)
        blocks = torch.arange((max(sizes) + 1) * width, device=model.device).view(-1, width)
        self.state.tables.copy_(blocks.clamp(max=max(sizes) * width))

    @torch.inference_mode()
    def milliseconds(self) -> list[float]:
        """A step's time for each number of sequences, the least of a few rounds."""
        return [self._one(size) for size in self.sizes]

    def _one(self, size: int) -> float:
        inputs = RowInputs.empty(size, self.model.device)
        inputs.integers[0] = torch.arange(size)
        inputs.integers[1] = self.context
        inputs.integers[2] = -1
        inputs.floats[4] = 1.0
        decode_step(self.model, self.cache, self.state, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decode_step(self.model, self.cache, self.state, inputs)
        times = []
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / REPLAYS)
        return min(times)


def choose(problem: Problem, steps: Steps, entries: dict[Any, dict[str, Any]], best: list[float]) -> list[float]:
    """The times with the fastest candidate, which `entries` then holds; what it held stays where none is faster."""
    key = (problem.out_features, problem.in_features, problem.rows, problem.is_gated)
    about = {"out": key[0], "in": key[1], "rows": key[2], "gated": key[3]}
    kept = entries.get(key)
    for config in candidates(problem):
        entries[key] = {**about, **config._asdict()}
        found = time_of(steps, config)
        if found is not None and relative(found, best) < GAIN:
            kept, best = entries[key], found
    if kept is None:
        del entries[key]
    else:
        entries[key] = kept
    return best


def time_of(steps: Steps, config: Config) -> list[float] | None:
    """None for settings that the GPU has no room for."""
    try:
        return steps.milliseconds()
    except Exception as error:
        if "out of resource" not in str(error):
            print(f"failed: {config}: {error}", flush=True)
        return None


def relative(times: list[float], to: list[float]) -> float:
    """The mean ratio."""
    return sum(one / other for one, other in zip(times, to, strict=True)) / len(times)


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--shape", default="llama-3.1-8b", choices=sorted(path.name for path in SHAPES.iterdir()))
    arguments.add_argument("--format", default="none", choices=FORMATS)
    arguments.add_argument("--kv-cache-dtype", default="auto")
    arguments.add_argument("--rows", default="16,32,64", help="entries to choose")
    arguments.add_argument("--context", type=int, default=1088)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--seconds", type=float, default=240.0, help="stop beginning new products after this long")
    arguments.add_argument("--out", type=Path, help="default: the package's own table of this device")
    given = arguments.parse_args()
    start, device = time.perf_counter(), torch.device("cuda")
    options = EngineConfig.from_options(device="cuda", max_model_len=2048, kv_cache_dtype=given.kv_cache_dtype)
    config = resolve(options, has_cuda=True, model_dtype="bfloat16")
    model = random_decoder(SHAPES / given.shape, config, given.format)
    model.blocks = model.blocks[: given.layers]
    product = PRODUCTS[given.format]
    entries = tuned_table.of_device(device).setdefault(f"{product} bfloat16", {})
    for rows in map(int, given.rows.split(",")):
        steps = Steps(model, SIZES.get(rows, (rows,)), given.context)
        steps.cache.layers = steps.cache.layers[: given.layers]
        best = first = steps.milliseconds()
        wanted = [one for one in problems(given.shape, [product], [rows]) if one.out_features < model.config.vocab_size]
        for problem in sorted(wanted, key=lambda one: -one.weight_bytes()):
            if time.perf_counter() - start > given.seconds:
                print("out of time", flush=True)
                break
            best = choose(problem, steps, entries, best)
            chosen = entries.get((problem.out_features, problem.in_features, rows, problem.is_gated))
            print(f"{given.format} {rows} rows, {problem.out_features} of {problem.in_features}: {chosen}", flush=True)
        print(f"{given.format} {rows} rows: {first} -> {best} ms, {time.perf_counter() - start:.0f} s", flush=True)
        out = given.out or tuned_table.FOLDER / tuned_table.file_name(device)
        tuned_table.write(out, tuned_table.of_device(device))


if __name__ == "__main__":
    main()
