"""Where the time of a decode step goes on this machine: the products, attention, and everything around them.

Times whole steps without the profiler first, then the share of each op under torch's profiler (whose own cost inflates
the small ones).
"""

from __future__ import annotations

import random
import statistics
import time

import torch
from common import parser, write
from torch.profiler import ProfilerActivity, profile

from powertrain.checkpoint.hub import resolve_model
from powertrain.config import EngineConfig, physical_cores
from powertrain.engine.core import Engine
from powertrain.measure import record
from powertrain.types import Request, SamplingParams

PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise", "aten::_weight_int8pack_mm")
PRODUCTS_INT4 = "aten::_weight_int4pack_mm_for_cpu"


def main() -> None:
    arguments = parser(__doc__, "cpu_decode_profile.json")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--prompt", type=int, default=128)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--threads", type=int, default=physical_cores())
    given = arguments.parse_args()
    engine = Engine.from_checkpoint(resolve_model(given.model), EngineConfig.from_options(threads=given.threads))
    source = random.Random(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=2 * given.steps + 8, ignore_eos=True)
    for number in range(given.batch):
        prompt = tuple(source.randrange(10, engine.info.vocab_size - 10) for _ in range(given.prompt))
        engine.add(Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
    while engine.scheduler.waiting or any(sequence.num_output < 3 for sequence in engine.scheduler.running):
        engine.step()
    times = []
    for _ in range(given.steps):
        start = time.perf_counter()
        engine.step()
        times.append(1000 * (time.perf_counter() - start))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(given.steps):
            engine.step()
    shares = {event.key: event.self_cpu_time_total / 1000 / given.steps for event in profiled.key_averages()}
    products = sum(ms for name, ms in shares.items() if name in (*PRODUCTS, PRODUCTS_INT4))
    largest = dict(sorted(shares.items(), key=lambda item: -item[1])[:15])
    results = {
        "batch": given.batch,
        "step_ms": {"min": min(times), "median": statistics.median(times), "max": max(times)},
        "profiled_ms_per_step": {"products": products, "all_ops": sum(shares.values()), "largest": largest},
    }
    print(
        f"step min {min(times):.1f} ms, median {statistics.median(times):.1f} ms; profiled: products {products:.1f} ms"
    )
    for name, ms in largest.items():
        print(f"{ms:>8.2f} ms  {name}")
    made = record.new_record(
        "decode_profile",
        git=given.git,
        model=given.model,
        config={"threads": torch.get_num_threads(), "prompt": given.prompt, "steps": given.steps},
        results=results,
    )
    write(given.json, made)


if __name__ == "__main__":
    main()
