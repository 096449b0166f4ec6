"""How fast one checkpoint is under several engine settings, measured in a process of its own.

Its own process, because peak memory is a property of a process and because nothing of one candidate may linger in the
next. The child reads a job as JSON on stdin and prints one JSON line per setting.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powertrain.optimize.space import Setting, Speed
from powertrain.types import FinishReason, PowertrainError, Request, SamplingParams

if TYPE_CHECKING:
    from powertrain.config import EngineConfig
    from powertrain.engine.core import Engine

_CHILD_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedWorkload:
    """`prompts` (token ids) arrive at once; each gets exactly `output` tokens, sampled at `temperature`, by `seed`.

    Best throughput of `repeats` runs after one short warm-up run. The KV pool has `pool_bytes`: sized to the work,
    since a server's default pool would be most of the memory measured and say nothing about the candidate.
    """

    prompts: tuple[tuple[int, ...], ...]
    output: int
    pool_bytes: int
    temperature: float = 0.6
    seed: int = 0
    repeats: int = 2


def measure_speed(
    model: Path, settings: Sequence[Setting], workload: SpeedWorkload, device: str = "auto"
) -> list[Speed]:
    """One `Speed` per setting. Raises `PowertrainError` with the child's last words if it fails or hangs."""
    job = {
        "model": str(model),
        "device": device,
        "settings": [dict(setting.options) for setting in settings],
        "workload": asdict(workload),
    }
    # Not `-m`: the package has imported this module already, and Python warns of running it a second time.
    command = [sys.executable, "-c", "from powertrain.optimize.speed import main; main()"]
    try:
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise PowertrainError(f"the speed measurement took longer than {_CHILD_TIMEOUT_S:.0f} s") from None
    speeds = [Speed(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or len(speeds) != len(settings):
        words = done.stderr.strip().splitlines()
        reason = words[-1].removeprefix("error: ") if words else f"exit status {done.returncode}"
        raise PowertrainError(f"the speed measurement failed: {reason}")
    return speeds


def measure_here(model: Path, options: Mapping[str, Any], workload: SpeedWorkload, device: str) -> Speed:
    """Load `model` in this process and measure it under one setting."""
    from powertrain.engine.core import Engine
    from powertrain.measure.bench import peak_memory_bytes

    engine = Engine.from_checkpoint(model, _engine_config(options, device, workload))
    try:
        _run(engine, workload, output=min(4, workload.output))
        runs = [_run(engine, workload, workload.output) for _ in range(workload.repeats)]
        seconds, ttft, tpot = min(runs)
        num_tokens = len(workload.prompts) * workload.output
        return Speed(
            ttft_ms=1000 * ttft,
            tpot_ms=1000 * tpot,
            output_tokens_per_s=num_tokens / seconds,
            memory_bytes=peak_memory_bytes(engine.info.device),
            weight_bytes=engine.model.weight_bytes(),
        )
    finally:
        engine.close()


def _engine_config(options: Mapping[str, Any], device: str, workload: SpeedWorkload) -> EngineConfig:
    from powertrain.config import EngineConfig, SpeculationConfig

    given = {"kv_cache_memory_bytes": workload.pool_bytes, **options}
    draft = given.pop("speculative_config", None)
    if draft is not None:
        given["speculation"] = SpeculationConfig(**draft)
    # The runs share their prompts: with the prefix cache on, the second would skip its prefill.
    return EngineConfig.from_options(device=device, seed=workload.seed, enable_prefix_caching=False, **given)


def _run(engine: Engine, workload: SpeedWorkload, output: int) -> tuple[float, float, float]:
    """Seconds in all, mean seconds to the first token and mean seconds per later token over the requests."""
    start = time.perf_counter()
    for number, prompt in enumerate(workload.prompts):
        sampling = SamplingParams(
            temperature=workload.temperature, seed=workload.seed + number, max_tokens=output, ignore_eos=True
        )
        engine.add(Request(request_id=f"speed-{number}", prompt_token_ids=prompt, sampling=sampling))
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    num_tokens = 0
    while engine.has_work():
        outputs = engine.step()
        now = time.perf_counter() - start
        for token in outputs:
            if token.finish_reason is FinishReason.ERROR:
                raise PowertrainError(f"the engine failed: {token.error}")
            num_tokens += len(token.token_ids)
            first.setdefault(token.request_id, now)
            last[token.request_id] = now
    count = len(workload.prompts)
    if num_tokens != count * output:
        raise PowertrainError(f"the engine returned {num_tokens} tokens, {count * output} were asked for")
    ttft = sum(first.values()) / count
    per_token = sum(last[key] - first[key] for key in first) / (count * max(1, output - 1))
    return time.perf_counter() - start, ttft, per_token


def main() -> None:
    """The child process: a job on stdin, a line per setting on stdout."""
    job = json.load(sys.stdin)
    raw = job["workload"]
    workload = SpeedWorkload(**{**raw, "prompts": tuple(map(tuple, raw["prompts"]))})
    try:
        for options in job["settings"]:
            speed = measure_here(Path(job["model"]), options, workload, job["device"])
            print(json.dumps(asdict(speed)), flush=True)
    except PowertrainError as error:
        sys.exit(f"error: {error}")
