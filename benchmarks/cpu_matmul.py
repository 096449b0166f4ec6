"""Where the product formats cross on this CPU: microseconds per product over row counts, for one model's matrices.

Cycles through copies larger than the caches, as a model's layers do. The thresholds and layouts in `kernels/matmul.py`
and `model/weights.py` come from this table: `python benchmarks/cpu_matmul.py --json docs/results/cpu_matmul.json`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from powertrain.kernels.matmul import block_dense, blocked_linear, int4_linear, int8_linear
from powertrain.measure.record import new_record, write_record
from powertrain.model.weights import Int4Group, IntWeight

SHAPES = {"qkv": (960, 576, 30), "output": (576, 576, 30), "gate_up": (3072, 576, 30), "down": (576, 1536, 30)}
HEAD = {"head": (49152, 576, 1)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CACHE_BYTES = 64 * 2**20


def microseconds(run: Callable[[], Any], seconds: float = 0.15) -> float:
    run()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        run()
        count += 1
    return 1e6 * elapsed / count


def products(out: int, inner: int) -> dict[str, Callable[[torch.Tensor], Any]]:
    """Each way to multiply rows by a [out, inner] matrix, over enough copies to defeat the caches."""
    copies = max(1, CACHE_BYTES // (4 * out * inner))
    dense = [torch.randn(out, inner) for _ in range(copies)]
    input_major = [weight.t().contiguous() for weight in dense]
    blocked = [block_dense(weight) for weight in dense]
    ints = [torch.randint(-128, 128, (out, inner), dtype=torch.int8) for _ in range(copies)]
    scale = torch.rand(out) * 0.01
    narrow = IntWeight(ints[0] >> 4, torch.rand(out, inner // 64) * 0.01, None, 4)
    int4 = [Int4Group.pack(narrow, torch.device("cpu")) for _ in range(copies)]
    turn = itertools.cycle(range(copies))
    torch_int8, torch_int4 = int8_linear.providers[0].run, int4_linear.providers[0].run

    def four_bits(run: Callable[..., Any], x: torch.Tensor) -> Any:
        weight = int4[next(turn)]
        return run(x, weight._packed, weight._nibbles, weight._scale_and_zero, 64)

    return {
        "output-major": lambda x: torch.nn.functional.linear(x, dense[next(turn)]),
        "input-major": lambda x: x @ input_major[next(turn)],
        "blocked": lambda x: blocked_linear(x, blocked[next(turn)]),
        "int8 packed": lambda x: torch_int8(x, ints[next(turn)], scale),
        "int8 dequantized": lambda x: int8_linear.reference(x, ints[next(turn)], scale),
        "int4 packed": lambda x: four_bits(torch_int4, x),
        "int4 dequantized": lambda x: four_bits(int4_linear.reference, x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--git", metavar="COMMIT")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for name, (out, inner, count) in (SHAPES | HEAD).items():
        ways = products(out, inner)
        for rows in ROWS:
            x = torch.randn(rows, inner)
            times = {way: microseconds(lambda run=run, x=x: run(x)) for way, run in ways.items()}
            results.append({"matrix": name, "out": out, "in": inner, "count": count, "rows": rows, "us": times})
    print(f"{'rows':>5}" + "".join(f"{way:>18}" for way in results[0]["us"]) + "   ms for all products of a step")
    for rows in ROWS:
        picked = [row for row in results if row["rows"] == rows]
        sums = {way: sum(row["us"][way] * row["count"] for row in picked) / 1000 for way in picked[0]["us"]}
        print(f"{rows:>5}" + "".join(f"{sums[way]:>18.1f}" for way in sums))
    if arguments.json:
        record = new_record("matmul", git=arguments.git, config={"threads": arguments.threads}, results=results)
        write_record(arguments.json, record)


if __name__ == "__main__":
    main()
