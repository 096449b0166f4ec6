"""What the server adds to the first token: time over HTTP less time in the engine of this process, same prompts.

Runs alternate, so that a change of the machine's mood meets both sides. Neither side uses its prefix cache.
"""

from __future__ import annotations

import json
import random
import statistics
import time

import httpx
from common import parser, server, words, write

from powertrain.config import EngineConfig, physical_cores
from powertrain.measure import record
from powertrain.types import Request, SamplingParams

TARGET_MS = 10.0


def main() -> None:
    arguments = parser(__doc__, "server_overhead.json")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--prompt-words", type=int, default=32)
    arguments.add_argument("--repeats", type=int, default=30)
    arguments.add_argument("--threads", type=int, default=physical_cores())
    given = arguments.parse_args()

    from powertrain.checkpoint.hub import resolve_model
    from powertrain.checkpoint.tokenizer_files import load_tokenizer
    from powertrain.engine.core import Engine

    path = resolve_model(given.model)
    tokenizer = load_tokenizer(path)
    config = EngineConfig.from_options(threads=given.threads, enable_prefix_caching=False, max_num_seqs=8)
    engine = Engine.from_checkpoint(path, config)

    def in_process(text: str) -> float:
        ids = tuple(tokenizer.encode(text))
        start = time.perf_counter()
        engine.add(Request(request_id="x", prompt_token_ids=ids, sampling=SamplingParams(temperature=0, max_tokens=4)))
        while not any(output.token_ids for output in engine.step()):
            pass
        seconds = time.perf_counter() - start
        engine.abort("x")
        while engine.has_work():
            engine.step()
        return seconds

    def over_http(client: httpx.Client, url: str, text: str) -> float:
        body = {"model": given.model, "prompt": text, "temperature": 0, "max_tokens": 4, "stream": True}
        start = time.perf_counter()
        first = None
        with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if first is None and line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                    first = time.perf_counter() - start
        if first is None:
            raise SystemExit("the server sent no text")
        return first

    flags = ("--threads", str(given.threads), "--no-enable-prefix-caching", "--served-model-name", given.model)
    source = random.Random(0)
    pairs = []
    with server(given.model, *flags) as url, httpx.Client(timeout=60) as client:
        for number in range(given.repeats + 3):
            text = words(given.prompt_words, source)
            pair = in_process(text), over_http(client, url, text)
            if number >= 3:  # the first ones warm both sides up
                pairs.append(pair)
    engine.close()
    engine_ms = [1000 * seconds for seconds, _ in pairs]
    http_ms = [1000 * seconds for _, seconds in pairs]
    added = statistics.median(h - e for e, h in zip(engine_ms, http_ms, strict=True))
    results = [
        {"name": "engine", "median_ms": statistics.median(engine_ms), "min_ms": min(engine_ms)},
        {"name": "http", "median_ms": statistics.median(http_ms), "min_ms": min(http_ms)},
        {"name": "added", "median_ms": added, "target_ms": TARGET_MS, "meets_target": added <= TARGET_MS},
    ]
    for row in results:
        print(f"{row['name']:<7} {row['median_ms']:.2f} ms")
    config_shown = {"prompt_words": given.prompt_words, "repeats": given.repeats, "threads": given.threads}
    made = record.new_record("server_overhead", git=given.git, model=given.model, config=config_shown, results=results)
    write(given.json, made)


if __name__ == "__main__":
    main()
