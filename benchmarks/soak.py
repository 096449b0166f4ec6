"""Many concurrent streams against a live server for a while: no error, and no KV block in use afterwards.

Exits with status 1 if either fails; the record is written all the same.
"""

from __future__ import annotations

import sys
import time

import httpx
from common import parser, server, write

from powertrain.measure import loadgen


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
    given = arguments.parse_args()
    with server(given.model) as url:
        load = loadgen.Load(
            url=url,
            concurrency=given.streams,
            duration_s=given.seconds,
            prompt_words=given.prompt_words,
            max_tokens=given.output,
            cancel_share=given.cancel_share,
        )
        made = loadgen.bench_serve(load, git=given.git)
        left = settled(url)
    row = made["results"][0]
    is_good = row["failed"] == 0 and row["completed"] > 0 and not any(left.values())
    print(f"{row['completed']} requests completed, {row['failed']} failed {row['failures'] or ''}; afterwards {left}")
    # No URL in the record: the port is another one each time.
    config = {key: value for key, value in made["config"].items() if key != "url"}
    write(given.json, {**made, "kind": "soak", "config": config, "afterwards": left, "is_good": is_good})
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
