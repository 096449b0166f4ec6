"""Choose the launch settings of few rows' products where they run: in the decode steps of a whole model.

Measured alone (`tune_gpu.py`) a product finds an idle GPU. In a step its programs take their places while those of the
kernel before still run, and what they ask for ahead competes with that. So the few candidates that were the fastest
alone take turns in a captured step, the largest product first, and one that is faster than what the table holds stays.
Random weights, contexts of `--context` tokens; the entries go to the table that the kernels read.

    python benchmarks/tune_gpu_step.py --shape llama-3.1-8b --formats int4,fp8 --rows 1,16,32
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from tune_gpu import Config, Problem, compile_all, entry_of, problems, ranked

from powertrain.checkpoint.load import random_decoder
from powertrain.config import EngineConfig, resolve
from powertrain.engine.graph import DeviceState, RowInputs, decode_step
from powertrain.kernels.gpu import tuned_table
from powertrain.model.decoder import Decoder, KVCache

SHAPES = Path(__file__).resolve().parent / "shapes"
PRODUCTS = {"none": "dense_linear", "int4": "int4", "fp8": "fp8", "int8": "int8"}
SIZES = {16: 8}
"""Sequences of the steps that judge an entry, where they are not its number of rows."""
SHORTLIST = 5
"""Candidates that are tried in the step."""
GAIN = 0.997
"""A candidate wins with less than this part of the best time: replays differ by less."""
REPLAYS, ROUNDS = 8, 5


class Steps:
    """Decode steps of `size` sequences, timed as graphs."""

    def __init__(self, model: Decoder, size: int, context: int) -> None:
        self.model, self.size, self.context = model, size, context
        width = -(-context // 16) + 1
        self.cache: KVCache = model.new_cache(size * width + 1, 16)
        self.state = DeviceState.empty(size, width, model.config.vocab_size, model.device)
        blocks = torch.arange((size + 1) * width, device=model.device).view(-1, width)
        self.state.tables.copy_(blocks.clamp(max=size * width))

    @torch.inference_mode()
    def milliseconds(self) -> float:
        """A step's time, the least of a few rounds."""
        inputs = RowInputs.empty(self.size, self.model.device)
        inputs.integers[0] = torch.arange(self.size)
        inputs.integers[1] = self.context
        inputs.integers[2] = -1
        inputs.floats[4] = 1.0
        decode_step(self.model, self.cache, self.state, inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decode_step(self.model, self.cache, self.state, inputs)
        times: list[float] = []
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / REPLAYS)
        return min(times)


def choose(problem: Problem, steps: Steps, entries: dict[Any, dict[str, Any]], best: float) -> float:
    """The time with the fastest candidate, which `entries` then holds; what it held stays where none is faster."""
    key = (problem.out_features, problem.in_features, problem.rows, problem.is_gated)
    kept, first = entries.get(key), best
    alone = [(time_s, config) for time_s, config in ranked(problem, steps.model.device) if config is not None]
    for time_s, config in alone[:SHORTLIST]:
        entries[key] = {**entry_of(problem, config), "us": round(1e6 * time_s, 2)}
        found = time_of(steps, config)
        print(f"    {1e6 * time_s:7.1f} us alone, {found or 0.0:.3f} ms the step: {config}", flush=True)
        if found is not None and found < GAIN * best:
            kept, best = entries[key], found
    if kept is None:
        del entries[key]
    else:
        entries[key] = kept
    print(f"{' '.join(map(str, problem))}: {first:.3f} -> {best:.3f} ms with {kept}", flush=True)
    return best


def time_of(steps: Steps, config: Config) -> float | None:
    """None for settings that the GPU has no room for."""
    try:
        return steps.milliseconds()
    except Exception as error:
        if "out of resource" not in str(error):
            print(f"failed: {config}: {error}", flush=True)
        return None


def wanted_problems(shape: str, weights: str, rows: int) -> list[Problem]:
    """The products of a format, the largest first; the head is dense in each and is chosen with the dense ones."""
    product = f"row {PRODUCTS[weights]}" if rows == 1 else PRODUCTS[weights]
    return sorted(problems(shape, [product], [rows]), key=lambda one: -one.weight_bytes())


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--shape", default="llama-3.1-8b", choices=sorted(path.name for path in SHAPES.iterdir()))
    arguments.add_argument("--formats", default="none", help=f"of {', '.join(PRODUCTS)}, separated by commas")
    arguments.add_argument("--kv-cache-dtype", default="auto")
    arguments.add_argument("--rows", default="1,16,32,64", help="entries to choose")
    arguments.add_argument("--context", type=int, default=1088)
    arguments.add_argument("--seconds", type=float, default=240.0, help="stop beginning new products after this long")
    arguments.add_argument("--out", type=Path, help="default: the package's own table of this device")
    given = arguments.parse_args()
    start, device = time.perf_counter(), torch.device("cuda")
    formats, all_rows = given.formats.split(","), [int(part) for part in given.rows.split(",")]
    every = [one for weights in formats for rows in all_rows for one in wanted_problems(given.shape, weights, rows)]
    compile_all(every, "cuda", os.cpu_count() or 1)
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    options = EngineConfig.from_options(device="cuda", max_model_len=2048, kv_cache_dtype=given.kv_cache_dtype)
    config = resolve(options, has_cuda=True, model_dtype="bfloat16")
    for weights in formats:
        model = random_decoder(SHAPES / given.shape, config, weights)
        for rows in all_rows:
            steps = Steps(model, SIZES.get(rows, rows), given.context)
            best = first = steps.milliseconds()
            for problem in wanted_problems(given.shape, weights, rows):
                if time.perf_counter() - start > given.seconds:
                    print("out of time", flush=True)
                    break
                entries = tuned_table.of_device(device).setdefault(f"{problem.product} bfloat16", {})
                best = choose(problem, steps, entries, best)
            print(
                f"{weights} {rows} rows: {first:.3f} -> {best:.3f} ms, {time.perf_counter() - start:.0f} s", flush=True
            )
            tuned_table.write(
                given.out or tuned_table.FOLDER / tuned_table.file_name(device), tuned_table.of_device(device)
            )
        del model, steps
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
