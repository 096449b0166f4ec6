"""Where the time of a decode step on a GPU goes: what each kernel adds to the step, beside the bytes it cannot avoid.

Kernels overlap: each takes its place while the one before still runs, so that its own time holds waiting. What it adds
is the time from the end of all before it to its own end, and these sum to the step. Whole steps are timed first,
without the profiler. The floor of a kind is the time of its bytes at the measured read bandwidth. Random weights.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from torch.profiler import ProfilerActivity, profile

from powertrain.config import EngineConfig
from powertrain.engine.core import Engine
from powertrain.measure import record, roofline
from powertrain.measure.bench import FORMATS, random_prompts, start_engine
from powertrain.types import Request, SamplingParams

SHAPES = Path(__file__).resolve().parent / "shapes"
PRODUCTS = (
    "skinny",
    "matrix_kernel",
    "int4_kernel",
    "rounded_kernel",
    "row_kernel",
    "sliced_kernel",
    "nvjet",
    "gemm",
    "cutlass",
)
ATTENTION = ("decode_kernel", "merge_kernel")
TIMED, PROFILED = 30, 8
BATCHED_TOKENS = 8192
Span = tuple[str, float, float]
"""A kernel's name, its start and its end in microseconds."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    arguments.add_argument("--shape", default="llama-3.1-8b", choices=sorted(path.name for path in SHAPES.iterdir()))
    arguments.add_argument("--format", default="none", choices=FORMATS)
    arguments.add_argument("--kv-cache-dtype", default="auto")
    arguments.add_argument("--batch", default="1,64,256")
    arguments.add_argument("--prompt", type=int, default=1024)
    arguments.add_argument("--out", type=Path, default=RESULTS)
    arguments.add_argument("--git", help="commit to record where git is missing")
    given = arguments.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    batches = [int(part) for part in given.batch.split(",")]
    ceilings = roofline.measure_ceilings("cuda")  # before the engine: its KV pool leaves no room
    config = EngineConfig.from_options(
        device="cuda",
        max_model_len=given.prompt + num_outputs(max(batches), given.prompt),
        max_num_seqs=max(batches),
        max_num_batched_tokens=BATCHED_TOKENS,
        enable_prefix_caching=False,
        kv_cache_dtype=given.kv_cache_dtype,
    )
    engine, _ = start_engine(SHAPES / given.shape, config, True, given.format)
    results = [profiled_batch(engine, batch, given.prompt, ceilings) for batch in batches]
    for result in results:
        print(table(result), flush=True)
    about = {"model": given.shape, "format": given.format, "kv_cache_dtype": engine.model.kv_cache_dtype}
    made = record.new_record("gpu_step_profile", git=given.git, **about, prompt=given.prompt, results=results)
    cache = "" if given.kv_cache_dtype == "auto" else f"_{given.kv_cache_dtype}-kv"
    write(given.out / f"gpu_step_profile_{given.shape}_{given.format}{cache}.json", made)
    engine.close()


def profiled_batch(engine: Engine, batch: int, prompt: int, ceilings: roofline.Ceilings) -> dict[str, Any]:
    """Milliseconds a step of `batch` sequences, whole and by kernel."""
    start_sequences(engine, batch, prompt)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(TIMED):
        engine.step()
    torch.cuda.synchronize()
    step_ms = 1000 * (time.perf_counter() - started) / TIMED
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            engine.step()
        torch.cuda.synchronize()
    events = profiled.events() or []
    spans = [(event.name, event.time_range.start, event.time_range.end) for event in events if is_on_device(event)]
    assert len(engine.scheduler.running) == batch, "sequences ended while they were measured"
    while engine.has_work():
        engine.step()
    kernels = {
        name: {"count": count / PROFILED, "added_ms": added / 1000 / PROFILED, "own_ms": own / 1000 / PROFILED}
        for name, (count, added, own) in by_kernel(spans).items()
    }
    context = prompt + 1 + TIMED + PROFILED / 2
    floors = {
        "products": 1000 * engine.model.step_bytes() / ceilings.read_bytes_per_s,
        "attention": 1000 * batch * engine.model.kv_bytes_per_token() * context / ceilings.read_bytes_per_s,
        "rest": 0.0,
    }
    added = {kind: sum(of["added_ms"] for name, of in kernels.items() if kind_of(name) == kind) for kind in floors}
    kinds = {kind: {"floor_ms": floor, "added_ms": added[kind]} for kind, floor in floors.items()}
    layer = mean_layer(spans)
    return {"batch": batch, "step_ms": step_ms, "kinds": kinds, "kernels": kernels, "layer": layer}


def num_outputs(batch: int, prompt: int) -> int:
    """Enough that the first sequence still decodes when the last has begun and all is measured."""
    return 2 * (TIMED + PROFILED + batch * prompt // BATCHED_TOKENS)


def start_sequences(engine: Engine, batch: int, prompt: int) -> None:
    """Requests of random prompts, stepped until all decode."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_outputs(batch, prompt), ignore_eos=True)
    for number, ids in enumerate(random_prompts(batch, prompt, engine.info.vocab_size, random.Random(0))):
        engine.add(Request(request_id=str(number), prompt_token_ids=tuple(ids), sampling=sampling))
    engine.step()
    while engine.scheduler.waiting or any(sequence.num_output < 2 for sequence in engine.scheduler.running):
        engine.step()


def is_on_device(event: Any) -> bool:
    return str(event.device_type).endswith("CUDA")


def by_kernel(spans: Iterable[Span]) -> dict[str, tuple[int, float, float]]:
    """How often each kernel ran, what it added and its own time, in microseconds; most added first."""
    counts: dict[str, int] = defaultdict(int)
    added: dict[str, float] = defaultdict(float)
    own: dict[str, float] = defaultdict(float)
    last = None
    for name, start, end in sorted(spans, key=lambda span: span[2]):
        counts[name] += 1
        own[name] += end - start
        added[name] += end - start if last is None else end - last
        last = end
    return {name: (counts[name], added[name], own[name]) for name in sorted(added, key=lambda name: -added[name])}


def mean_layer(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """What each kernel of a layer adds, in their order from one attention to the next, in microseconds."""
    ordered = sorted(spans, key=lambda span: span[2])
    begins = [at for at, span in enumerate(ordered) if ATTENTION[0] in span[0]]
    runs = [range(first, last) for first, last in itertools.pairwise(begins)]
    usual = statistics.median_low(len(run) for run in runs)
    runs = [run for run in runs if len(run) == usual]  # the others hold the end of a step
    layer = []
    for place in range(usual):
        own = [ordered[run[place]] for run in runs]
        added = [ordered[run[place]][2] - ordered[run[place] - 1][2] for run in runs]
        mean_own = statistics.fmean(end - start for _, start, end in own)
        layer.append({"kernel": own[0][0], "added_us": statistics.fmean(added), "own_us": mean_own})
    return layer


def kind_of(name: str) -> str:
    if any(part in name for part in PRODUCTS):
        return "products"
    return "attention" if any(part in name for part in ATTENTION) else "rest"


def table(result: dict[str, Any], most: int = 12) -> str:
    lines = [f"batch {result['batch']}: {result['step_ms']:.3f} ms a step"]
    for kind, of in result["kinds"].items():
        lines.append(f"  {kind:<46} added {of['added_ms']:8.3f} ms, floor {of['floor_ms']:7.3f}")
    for name, of in list(result["kernels"].items())[:most]:
        lines.append(f"    {name[:44]:<44} added {of['added_ms']:8.3f} ms, {of['count']:6.1f} times a step")
    lines.append("  a layer, us: " + ", ".join(f"{of['kernel'][:24]} {of['added_us']:.1f}" for of in result["layer"]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
