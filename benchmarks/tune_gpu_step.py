"""Choose the launch settings of few rows' products where they run: in the decode steps of a whole model.

Measured alone (`tune_gpu.py`) a product finds an idle GPU. In a step its programs take their places while those of the
kernel before still run, and what they ask for ahead competes with that. So the few candidates that were the fastest
alone take turns in a captured step, the largest product first, and one that is faster than what the table holds stays.
Random weights, contexts of `--context` tokens; the entries go to the table that the kernels read.

    python benchmarks/tune_gpu_step.py --shape llama-3.1-8b --formats int4,fp8 --rows 1,8,32
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
from tune_gpu import PRODUCTS as PRODUCTS_OF_TABLE
from tune_gpu import ROUNDED, Config, Problem, compile_all, entry_of, problems, ranked

from powertrain.checkpoint.load import random_decoder
from powertrain.config import EngineConfig, resolve
from powertrain.engine.graph import DeviceState, RowInputs, decode_step
from powertrain.kernels.gpu import tuned_table
from powertrain.kernels.quantized import MAX_UNROUNDED_ROWS
from powertrain.model.decoder import Decoder, KVCache

SHAPES = Path(__file__).resolve().parent / "shapes"
PRODUCTS = {"none": "dense_linear", "int4": "int4", "fp8": "fp8", "int8": "int8"}
SHORTLIST = 4
"""Candidates of a kernel that are tried in the step."""
SLOWER = 1.2
"""Times the fastest alone: slower candidates are not tried."""
GAIN = 0.997
"""A candidate wins with less than this part of the best time: replays differ by less."""
REPLAYS, ROUNDS = 8, 5
Table = dict[str, dict[tuned_table.Key, dict[str, Any]]]


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


def choose(alternatives: list[Problem], steps: Steps, table: Table, best: float) -> float:
    """The step's time with the fastest candidate for one product, which the table then holds.

    `alternatives`: the kernels that could do it; what the table held stays where nothing is faster.
    """
    problem = alternatives[0]
    key = (problem.out_features, problem.in_features, problem.rows, problem.is_gated)
    first, kept = best, {name_of(one): table.get(name_of(one), {}).get(key) for one in alternatives}
    for one, time_s, config in shortlist(alternatives, steps.model.device):
        entry = {**entry_of(one, config), "us": round(1e6 * time_s, 2)}
        put(table, key, {name_of(other): entry if other is one else None for other in alternatives})
        found = time_of(steps, config)
        print(f"    {1e6 * time_s:7.1f} us alone, {found or 0.0:.3f} ms the step: {one.product} {config}", flush=True)
        if found is not None and found < GAIN * best:
            kept, best = {name_of(other): entry if other is one else None for other in alternatives}, found
    put(table, key, kept)
    print(f"{' '.join(map(str, problem))}: {first:.3f} -> {best:.3f} ms with {kept}", flush=True)
    return best


def name_of(problem: Problem) -> str:
    return f"{problem.product} bfloat16"


def put(table: Table, key: tuned_table.Key, entries: dict[str, dict[str, Any] | None]) -> None:
    """Each product's entry, or none."""
    for name, entry in entries.items():
        own = table.setdefault(name, {})
        own.pop(key, None)
        if entry is not None:
            own[key] = entry


def shortlist(alternatives: list[Problem], device: torch.device) -> list[tuple[Problem, float, Config]]:
    """The fastest few of each kernel alone, one of each number of splits among them: who sums pieces pays for them."""
    found: list[tuple[Problem, float, Config]] = []
    for problem in alternatives:
        alone = [(time_s, config) for time_s, config in ranked(problem, device) if config is not None]
        by_splits = {getattr(config, "splits", 1): (time_s, config) for time_s, config in reversed(alone)}
        chosen = dict.fromkeys([*alone[: SHORTLIST - 2], *sorted(by_splits.values(), key=lambda one: one[0])])
        found += [(problem, time_s, config) for time_s, config in list(chosen)[:SHORTLIST]]
    fastest = min((time_s for _, time_s, _ in found), default=0.0)
    return [one for one in found if one[1] < SLOWER * fastest]


def time_of(steps: Steps, config: Config) -> float | None:
    """None for settings that the GPU has no room for."""
    try:
        return steps.milliseconds()
    except Exception as error:
        if "out of resource" not in str(error):
            print(f"failed: {config}: {error}", flush=True)
        return None


def wanted_problems(shape: str, weights: str, rows: int) -> list[list[Problem]]:
    """The products of a format, the largest first, each as the kernels that could do it take it.

    The head is dense in each format and is chosen with the dense ones.
    """
    product = PRODUCTS[weights]
    if rows == 1:
        names = [f"row {product}"]
    elif f"{product} rounded" in ROUNDED and rows > MAX_UNROUNDED_ROWS[ROUNDED[f"{product} rounded"]]:
        names = [f"{product} rounded"]
    else:
        names = [name for name in (product, f"sliced {product}") if name in PRODUCTS_OF_TABLE]
    found = [problems(shape, [name], [rows]) for name in names]
    return sorted(map(list, zip(*found, strict=True)), key=lambda one: -one[0].weight_bytes())


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--shape", default="llama-3.1-8b", choices=sorted(path.name for path in SHAPES.iterdir()))
    arguments.add_argument("--formats", default="none", help=f"of {', '.join(PRODUCTS)}, separated by commas")
    arguments.add_argument("--kv-cache-dtype", default="auto")
    arguments.add_argument("--rows", default="1,8,32,64", help="entries to choose")
    arguments.add_argument("--context", type=int, default=1088)
    arguments.add_argument("--seconds", type=float, default=240.0, help="stop beginning new products after this long")
    arguments.add_argument("--out", type=Path, help="default: the package's own table of this device")
    given = arguments.parse_args()
    start, device = time.perf_counter(), torch.device("cuda")
    formats, all_rows = given.formats.split(","), [int(part) for part in given.rows.split(",")]
    every = [
        problem
        for weights, rows in itertools.product(formats, all_rows)
        for alternatives in wanted_problems(given.shape, weights, rows)
        for problem in alternatives
    ]
    compile_all(every, "cuda", os.cpu_count() or 1)
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    options = EngineConfig.from_options(device="cuda", max_model_len=2048, kv_cache_dtype=given.kv_cache_dtype)
    config = resolve(options, has_cuda=True, model_dtype="bfloat16")
    for weights in formats:
        model = random_decoder(SHAPES / given.shape, config, weights)
        for rows in all_rows:
            steps = Steps(model, rows, given.context)
            best = first = steps.milliseconds()
            for alternatives in wanted_problems(given.shape, weights, rows):
                if time.perf_counter() - start > given.seconds:
                    print("out of time", flush=True)
                    break
                best = choose(alternatives, steps, tuned_table.of_device(device), best)
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
