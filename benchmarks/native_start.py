"""What it costs to be there: the first token of `generate` above a bare `import torch`, and the server's memory.

Processes are timed in turns (torch alone, then ours), so that the difference is taken between neighbours; where the
time goes is measured inside one more process, where the memory lies is read from the server's own maps.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
from common import parser, server, server_processes, write
from startup import run_to_end, run_to_first_byte

from powertrain.measure import record

TIME_TARGET_S = 1.2
MEMORY_TARGET_BYTES = 600e6
STAGES = """
import json, sys, time
start = time.perf_counter()
stages = {}
def done(name):
    global start
    stages[name] = time.perf_counter() - start
    start = time.perf_counter()
import torch
done("import torch")
import powertrain.cli
done("import the command line")
from powertrain.engine.core import Engine
from powertrain.llm import LLM
from powertrain.kernels import native
native.load()
done("import the engine and the native kernels")
from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.tokenizer_files import load_tokenizer
path = resolve_model(sys.argv[1])
load_tokenizer(path)
done("tokenizer")
from powertrain.checkpoint.load import load_decoder
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import EngineConfig, resolve
checkpoint = open_checkpoint(path)
config = resolve(EngineConfig(), has_cuda=False, model_dtype="float32")
decoder = load_decoder(checkpoint, config)
done("weights: map, check the hash, build the decoder")
engine = Engine(decoder, EngineConfig(), "model")
engine.warm_up()
done("cache and warm-up")
print(json.dumps(stages))
"""


def resident(pid: int) -> dict[str, int]:
    """Resident bytes of a process by what they are: the packed weights, libraries, other files, its own memory."""
    found = {"weights": 0, "libraries": 0, "other files": 0, "own memory": 0}
    kind = "own memory"
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (\d+)\s*(.*)$", line):
            name = head[2]
            is_file = head[1] != "0"
            kind = "own memory" if not is_file else "weights" if name.endswith((".packed", ".gguf")) else "other files"
            kind = "libraries" if is_file and ".so" in name else kind
        elif line.startswith("Rss:"):
            found[kind] += int(line.split()[1]) * 1024
    return found


def server_memory(model: str) -> dict[str, Any]:
    """Resident memory of the server's two processes after some requests."""
    with server(model) as url:
        body = {"model": "x", "prompt": "word " * 100, "max_tokens": 32, "temperature": 0}
        body["model"] = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        for _ in range(4):
            httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        web, engine = server_processes()
        return {"web": resident(web), "engine": resident(engine)}


def main() -> None:
    arguments = parser(__doc__, "native_start.json")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--repeats", type=int, default=7)
    given = arguments.parse_args()
    generate = [sys.executable, "-m", "powertrain", "generate", given.model, "Once upon a time", "--max-tokens", "8"]
    run_to_first_byte(generate)  # the packed weights are made once
    pairs = []
    for _ in range(given.repeats):
        pairs.append((run_to_end([sys.executable, "-c", "import torch"]), run_to_first_byte(generate)))
    above = statistics.median(ours - bare for bare, ours in pairs)
    stages = json.loads(
        subprocess.run([sys.executable, "-c", STAGES, given.model], check=True, capture_output=True).stdout
    )
    memory = server_memory(given.model)
    total = sum(sum(parts.values()) for parts in memory.values())
    torch_s, ours_s = (statistics.median(pair[at] for pair in pairs) for at in (0, 1))
    print(f"import torch {torch_s:.2f} s, first token {ours_s:.2f} s, above it {above:.2f} s (target {TIME_TARGET_S})")
    for name, seconds in stages.items():
        print(f"  {name:<48} {seconds:.3f} s")
    print(f"server: {total / 1e6:.0f} MB resident (target {MEMORY_TARGET_BYTES / 1e6:.0f})")
    for process, parts in memory.items():
        print(f"  {process:<8} " + ", ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items()) + " MB")
    made = record.new_record(
        "native_start",
        git=given.git,
        model=given.model,
        pairs_s=pairs,
        above_torch_s=above,
        target_s=TIME_TARGET_S,
        stages_s=stages,
        resident_bytes=memory,
        resident_total_bytes=total,
        target_bytes=MEMORY_TARGET_BYTES,
    )
    write(given.json, made)


if __name__ == "__main__":
    main()
