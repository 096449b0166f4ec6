"""How long the first things take: import, `--help`, the first token of `generate` from a cold process.

Medians of several processes. "Cold" is a new process; the model file may be in the page cache.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from common import parser, write

from powertrain.measure import record

TARGETS_S = {"import": 0.2, "help": 0.6, "first_token": 8.0}


def run_to_end(arguments: list[str]) -> float:
    """Seconds until the process has ended well."""
    start = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def run_to_first_byte(arguments: list[str]) -> float:
    """Seconds until the process has written its first byte to stdout."""
    start = time.perf_counter()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        if not first or process.wait() != 0:
            sys.exit(f"{' '.join(arguments)} failed")
    return seconds


def python_startup() -> float:
    """Seconds of an interpreter that does nothing: not ours, taken off the import time."""
    return statistics.median(run_to_end([sys.executable, "-c", "pass"]) for _ in range(5))


def main() -> None:
    arguments = parser(__doc__, "startup.json")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--repeats", type=int, default=5)
    given = arguments.parse_args()
    bare = python_startup()
    generate = ["generate", given.model, "Once upon a time", "--max-tokens", "8"]
    measures: dict[str, Callable[[], float]] = {
        "import": lambda: run_to_end([sys.executable, "-c", "import powertrain"]) - bare,
        "help": lambda: run_to_end([sys.executable, "-m", "powertrain", "--help"]),
        "first_token": lambda: run_to_first_byte([sys.executable, "-m", "powertrain", *generate]),
    }
    results: list[dict[str, Any]] = []
    for name, measure in measures.items():
        seconds = [measure() for _ in range(given.repeats)]
        median = statistics.median(seconds)
        row = {"name": name, "median_s": median, "min_s": min(seconds), "max_s": max(seconds)}
        results.append({**row, "target_s": TARGETS_S[name], "meets_target": median <= TARGETS_S[name]})
        print(f"{name:<12} {median:.3f} s (target {TARGETS_S[name]} s)")
    made = record.new_record("startup", git=given.git, model=given.model, repeats=given.repeats, results=results)
    write(given.json, made)


if __name__ == "__main__":
    main()
