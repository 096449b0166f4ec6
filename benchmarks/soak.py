"""Many concurrent streams against a live server for a while: no error, and no KV block in use afterwards.

With --mixed the traffic changes every minute (short and long prompts, long and short answers, clients that hang up),
the KV pool is small enough to be used up at once, and the server's resident memory must stay flat from there on. Exits
with status 1 if anything fails; the record is written all the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from common import parser, server, server_processes, write

from powertrain.measure import loadgen

TRAFFIC = ((16, 96, 0.0), (300, 16, 0.0), (64, 64, 0.3), (4, 200, 0.1))
"""Words of prompt, tokens of answer, share of clients that hang up: one after the other, a minute each."""

POOL_BYTES = 192 * 2**20
MAX_GROWTH = 1.03


def resident_bytes() -> int:
    """Resident memory of the server's two processes together."""
    total = 0
    for pid in server_processes():
        [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
        total += int(line.split()[1]) * 1024
    return total


def mixed(given: argparse.Namespace, url: str) -> dict[str, Any]:
    """Traffic of every kind in turns; the resident memory after each minute."""
    rows, memory = [], []
    for number in range(max(1, round(given.seconds / 60))):
        words, tokens, cancel_share = TRAFFIC[number % len(TRAFFIC)]
        load = loadgen.Load(
            url=url,
            concurrency=given.streams,
            duration_s=min(60.0, given.seconds),
            prompt_words=words,
            max_tokens=tokens,
            cancel_share=cancel_share,
        )
        made = loadgen.bench_serve(load, git=given.git)
        rows += made["results"]
        memory.append(resident_bytes())
        print(f"minute {number + 1}: {rows[-1]['completed']} completed, {memory[-1] / 1e6:.0f} MB resident", flush=True)
    return {**made, "results": rows, "resident_bytes": memory}


def gauges(url: str) -> dict[str, float]:
    """The sum over labels of each gauge that says something is still held."""
    wanted = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
    totals = dict.fromkeys(wanted, 0.0)
    seen = set()
    for line in httpx.get(f"{url}/metrics", timeout=10).text.splitlines():
        name = line.split("{")[0]
        if name in wanted:
            seen.add(name)
            totals[name] += float(line.rsplit(" ", 1)[1])
    if seen != set(wanted):
        sys.exit(f"/metrics lacks {', '.join(sorted(set(wanted) - seen))}")
    return totals


def settled(url: str, timeout_s: float = 15.0) -> dict[str, float]:
    """The gauges once they are all zero, or as they are after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while any((now := gauges(url)).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return now


def main() -> None:
    arguments = parser(__doc__, "soak.json")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--streams", type=int, default=64)
    arguments.add_argument("--seconds", type=float, default=60.0)
    arguments.add_argument("--prompt-words", type=int, default=32)
    arguments.add_argument("--output", type=int, default=64)
    arguments.add_argument("--cancel-share", type=float, default=0.0)
    arguments.add_argument("--mixed", action="store_true", help="traffic of every kind, memory watched")
    given = arguments.parse_args()
    flags = ("--kv-cache-memory-bytes", str(POOL_BYTES)) if given.mixed else ()
    with server(given.model, *flags) as url:
        made = mixed(given, url) if given.mixed else one_kind(given, url)
        left = settled(url)
    completed, failed = (sum(row[key] for row in made["results"]) for key in ("completed", "failed"))
    memory = made.get("resident_bytes", [])
    # every kind of traffic has been there once before growth counts
    warm = memory[len(TRAFFIC) - 1 :]
    is_flat = len(warm) < 2 or max(warm) <= MAX_GROWTH * warm[0]
    is_good = failed == 0 and completed > 0 and not any(left.values()) and is_flat
    print(f"{completed} requests completed, {failed} failed; afterwards {left}; memory {'flat' if is_flat else 'GREW'}")
    # No URL in the record: the port is another one each time.
    config = {key: value for key, value in made["config"].items() if key != "url"}
    write(given.json, {**made, "kind": "soak", "config": config, "afterwards": left, "is_good": is_good})
    sys.exit(0 if is_good else 1)


def one_kind(given: argparse.Namespace, url: str) -> dict[str, Any]:
    load = loadgen.Load(
        url=url,
        concurrency=given.streams,
        duration_s=given.seconds,
        prompt_words=given.prompt_words,
        max_tokens=given.output,
        cancel_share=given.cancel_share,
    )
    return loadgen.bench_serve(load, git=given.git)


if __name__ == "__main__":
    main()
