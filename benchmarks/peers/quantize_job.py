"""How a tool in a process of its own is asked to quantize: a job file in, a result file out. Standard library only.

A job says what to do in words that belong to no tool: `scheme` (`num_bits`, `group_size` or null for one group a row,
`activation_bits` or null), `method` (`transform`: null, awq or smoothquant; `round`: rtn, gptq or autoround;
`observer`: how ranges are chosen; what else the rounding takes), folders `source` and `out`, `calibration` (.npy of
token ids, int64 [samples, tokens]), `seed`, `threads` and `device` (cpu or cuda). Weights that stay floats and all
scales are float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]

DAMPING = 0.01
"""Of GPTQ: the share of the moments' mean diagonal that is added to it, the default of all."""


def ask(python: Path, script: Path, job: Job, folder: Path) -> dict[str, Any]:
    """Let `script` do the job in a process of its own, whose files stand in `folder`.

    Returns what the worker found, `peak_rss_bytes`, and `process_seconds` from its start to its end. Raises
    `RuntimeError` with the end of what it printed if it fails.
    """
    asked, answer, log = folder / "job.json", folder / "result.json", folder / "log.txt"
    asked.write_text(json.dumps(job), encoding="utf-8")
    threads = str(job["threads"])
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    started = time.perf_counter()
    with log.open("wb") as output:
        done = subprocess.run([python, script, asked, answer], stdout=output, stderr=output, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        tail = " ".join(log.read_text(errors="replace")[-600:].split())
        raise RuntimeError(f"{script.name} ended with status {done.returncode}: {tail}")
    result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return {**result, "process_seconds": seconds}


def serve(work: Callable[[Job], dict[str, Any]]) -> None:
    """The worker's side: do the job named on the command line and write down what `work` returns."""
    asked, answer = (Path(argument) for argument in sys.argv[1:])
    result = work(json.loads(asked.read_text(encoding="utf-8")))
    answer.write_text(json.dumps({**result, "peak_rss_bytes": _peak_rss_bytes()}), encoding="utf-8")


def _peak_rss_bytes() -> int | None:
    """Of this process since it was executed; None where the system does not tell (getrusage counts the parent too)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
