"""`bench engine`: prefill and decode speed of the engine alone, beside the floor of the machine it runs on.

Method (the same as the peers' tables): random prompt ids, greedy, end-of-text ignored, prefix cache off. Per batch,
`prefill_s` is the time for 1 output token, `step_ms` the time for output + 1 tokens less that for 1, over `output`;
best of two each. Runs with torch, numpy and the standard library alone: `python -m powertrain.measure.bench MODEL`.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from powertrain.config import EngineConfig, Kernels, KVCacheDType, resolve
from powertrain.engine.core import Engine, set_torch_threads
from powertrain.measure import record, roofline
from powertrain.types import FinishReason, PowertrainError, Request, SamplingParams

Format = Literal["none", "int8", "int4", "fp8"]
FORMATS: tuple[Format, ...] = get_args(Format)
MIXED_LENGTHS = (100, 1024)
MIXED_TEMPERATURE = 0.6

Progress = Callable[[str, float, float | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is measured: each of `batches`, `prompt` ids in and `output` timed steps; `mixed` requests, 0 for none."""

    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 1024
    output: int = 128
    mixed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise PowertrainError(f"--batch must be positive numbers, got {list(self.batches)}")
        if self.prompt < 1 or self.output < 1 or self.mixed < 0:
            raise PowertrainError("--prompt and --output must be at least 1, --mixed at least 0")

    @property
    def max_model_len(self) -> int:
        """Longest sequence of the workload, in tokens."""
        return max(self.prompt + self.output + 1, 2 * MIXED_LENGTHS[1] if self.mixed else 0)


def bench_engine(
    model: str | Path,
    *,
    random_weights: bool = False,
    format: Format = "none",
    batches: Sequence[int] = (1, 8, 32),
    prompt: int = 1024,
    output: int = 128,
    threads: int | None = None,
    mixed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    git: str | None = None,
    engine_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the engine on `model` and return the JSON record of kind "engine".

    `random_weights` draws them on the device, in `format`, from a folder with a `config.json`; otherwise the format is
    the checkpoint's own. `engine_options` are further names of `EngineConfig.from_options`. Raises `PowertrainError`
    for a workload longer than the model or an engine that returns another number of tokens than asked.
    """
    workload = Workload(batches=tuple(batches), prompt=prompt, output=output, mixed=mixed, seed=seed)
    check_format(format, random_weights)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    say = progress or (lambda what, done, total: None)
    say("measuring the machine", 0, None)
    # Before the engine exists: on CUDA the KV pool will leave no room for the buffers.
    ceilings = roofline.measure_ceilings(device, threads=threads)
    config = _engine_config(workload, device, dtype, threads, engine_options or {})
    say("loading the model", 0, None)
    engine, startup_s = start_engine(model, config, random_weights, format)
    try:
        results = _measure_batches(engine, workload, ceilings, say)
        mixed_result = _measure_mixed(engine, workload, say) if mixed else None
        return record.new_record(
            "engine",
            git=git,
            model=engine.info.model,
            format=format if random_weights else _stored_format(engine),
            kernels=engine.info.kernels,
            kv_cache_dtype=engine.model.kv_cache_dtype,
            config={**asdict(config), "info": asdict(engine.info), "seed": seed, "random_weights": random_weights},
            ceilings=asdict(ceilings),
            results=results,
            mixed=mixed_result,
            startup_s=startup_s,
            peak_memory_bytes=peak_memory_bytes(device),
        )
    finally:
        engine.close()


def timed_run(engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> float:
    """Seconds from handing all `prompts` to an idle engine until the last token is out.

    Raises `PowertrainError` if a sequence fails or the tokens are not exactly as many as `max_tokens` asks for.
    """
    start = time.perf_counter()
    for number, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
        engine.add(Request(request_id=f"bench-{number}", prompt_token_ids=tuple(prompt), sampling=params))
    num_tokens = 0
    while engine.has_work():
        for output in engine.step():
            num_tokens += len(output.token_ids)
            if output.finish_reason is FinishReason.ERROR:
                raise PowertrainError(f"the engine failed on {output.request_id}: {output.error}")
    seconds = time.perf_counter() - start
    expected = sum(params.max_tokens or 0 for params in sampling)
    if num_tokens != expected:
        raise PowertrainError(f"the engine returned {num_tokens} tokens, {expected} were asked for")
    return seconds


def random_prompts(count: int, length: int, vocab_size: int, source: random.Random) -> list[list[int]]:
    """`count` prompts of `length` uniform ids, away from both ends of the vocabulary where special tokens live."""
    edge = min(10, vocab_size // 4)
    return [[source.randrange(edge, vocab_size - edge) for _ in range(length)] for _ in range(count)]


def peak_memory_bytes(device: str) -> int:
    """Most memory held so far: of this process's resident set on a CPU, of torch's allocator on CUDA."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    # Not getrusage first: Linux hands its maximum down from a large parent to the process it starts.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _engine_config(
    workload: Workload, device: str, dtype: str, threads: int | None, extra: dict[str, Any]
) -> EngineConfig:
    extra = {name: value for name, value in extra.items() if value is not None}
    longest = workload.max_model_len
    max_num_seqs = int(extra.get("max_num_seqs", max(*workload.batches, min(workload.mixed, 256))))
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "seed": workload.seed,
        "max_model_len": longest,
        "max_num_seqs": max_num_seqs,
        "enable_prefix_caching": False,
    }
    if device == "cpu":
        # Room for every sequence at once: preemption would be measured as slow decoding.
        block_size = int(extra.get("block_size", EngineConfig().cache.block_size))
        options["num_blocks"] = max_num_seqs * (-(-longest // block_size) + 1) + 1
    return EngineConfig.from_options(**{**options, **extra})


def check_format(weight_format: str, random_weights: bool) -> None:
    """Raises `PowertrainError` for a format that is unknown, or given for weights that are not drawn."""
    if weight_format not in FORMATS:
        raise PowertrainError(f"--format must be one of {', '.join(FORMATS)}, got {weight_format!r}")
    if weight_format != "none" and not random_weights:
        raise PowertrainError("--format goes with --random-weights; to convert real weights use `powertrain compress`")


def start_engine(
    model: str | Path, config: EngineConfig, random_weights: bool, weight_format: Format
) -> tuple[Engine, float]:
    """The engine on `model`, a name or a path, warm, and the seconds that took; weights as in `bench_engine`."""
    if not random_weights:
        from powertrain.checkpoint.hub import resolve_model

        path = resolve_model(str(model))
        start = time.perf_counter()
        return Engine.from_checkpoint(path, config), time.perf_counter() - start
    from powertrain.checkpoint.load import random_decoder

    start = time.perf_counter()
    settled = resolve(config, has_cuda=torch.cuda.is_available(), model_dtype="bfloat16")
    set_torch_threads(settled)
    drawn = random_decoder(model, settled, weight_format)
    set_torch_threads(settled, drawn)
    engine = Engine(drawn, config, Path(model).name)
    engine.warm_up()
    return engine, time.perf_counter() - start


def _measure_batches(
    engine: Engine, workload: Workload, ceilings: roofline.Ceilings, say: Progress
) -> list[dict[str, Any]]:
    source = random.Random(workload.seed)
    say("warming up", 0, None)
    warm_length = min(128, workload.prompt)
    for batch, output in ((1, 8), (min(8, max(workload.batches)), 16)):
        _time_batch(engine, batch, warm_length, min(output, workload.output), source)
    results = []
    for number, batch in enumerate(workload.batches):
        say("measuring batches", number, len(workload.batches))
        first = min(_time_batch(engine, batch, workload.prompt, 1, source) for _ in range(2))
        whole = min(_time_batch(engine, batch, workload.prompt, workload.output + 1, source) for _ in range(2))
        results.append(_batch_row(engine, workload, ceilings, batch, first, whole))
    say("measuring batches", len(workload.batches), len(workload.batches))
    return results


def _batch_row(
    engine: Engine, workload: Workload, ceilings: roofline.Ceilings, batch: int, first: float, whole: float
) -> dict[str, Any]:
    # A model so small that noise exceeds its steps could come out negative; no clock resolves less than this.
    step_s = max(whole - first, 1e-9) / workload.output
    context = workload.prompt + (workload.output + 1) / 2
    if engine.model.multiplies_integers:
        ceilings = roofline.reading_alone(ceilings)
    floor = roofline.decode_floor(engine.model, ceilings, batch, context)
    return {
        "batch": batch,
        "prompt": workload.prompt,
        "output": workload.output,
        "prefill_s": first,
        "prefill_tokens_per_s": batch * workload.prompt / first,
        "step_ms": 1000 * step_s,
        "output_tokens_per_s": batch / step_s,
        "floor_ms": floor.ms,
        "fraction": floor.ms / (1000 * step_s),
        "bound": floor.bound,
    }


def _time_batch(engine: Engine, batch: int, prompt: int, output: int, source: random.Random) -> float:
    prompts = random_prompts(batch, prompt, engine.info.vocab_size, source)
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    return timed_run(engine, prompts, [sampling] * batch)


def _measure_mixed(engine: Engine, workload: Workload, say: Progress) -> dict[str, Any]:
    say(f"measuring {workload.mixed} mixed requests", 0, None)
    source = random.Random(workload.seed)
    low, high = MIXED_LENGTHS
    shapes = [(source.randint(low, high), source.randint(low, high)) for _ in range(workload.mixed)]
    prompts = [random_prompts(1, length, engine.info.vocab_size, source)[0] for length, _ in shapes]
    sampling = [SamplingParams(temperature=MIXED_TEMPERATURE, max_tokens=n, ignore_eos=True) for _, n in shapes]
    seconds = timed_run(engine, prompts, sampling)
    output_tokens = sum(n for _, n in shapes)
    return {
        "num_requests": workload.mixed,
        "prompt_tokens": sum(n for n, _ in shapes),
        "output_tokens": output_tokens,
        "seconds": seconds,
        "output_tokens_per_s": output_tokens / seconds,
    }


def _stored_format(engine: Engine) -> str:
    return "+".join(engine.model.formats())


def text_table(made: dict[str, Any]) -> str:
    """The record in plain text, for machines without rich."""
    lines = [
        f"{made['model']}, weights {made['format']}, KV {made['kv_cache_dtype']}, start {made['startup_s']:.1f} s",
        f"{'batch':>6} {'prefill s':>10} {'step ms':>9} {'tok/s':>9} {'floor ms':>9} {'of floor':>9}",
    ]
    for row in made["results"]:
        lines.append(
            f"{row['batch']:>6} {row['prefill_s']:>10.3f} {row['step_ms']:>9.3f} {row['output_tokens_per_s']:>9,.1f} "
            f"{row['floor_ms']:>9.3f} {row['fraction']:>9.0%}"
        )
    if made["mixed"]:
        mixed = made["mixed"]
        lines.append(f"mixed {mixed['num_requests']}: {mixed['output_tokens_per_s']:,.0f} output tok/s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m powertrain.measure.bench`: the same flags as `powertrain bench engine`, without its dependencies."""
    parser = argparse.ArgumentParser(prog="powertrain.measure.bench", description="Measure the engine's speed.")
    parser.add_argument("model")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--format", default="none", choices=FORMATS)
    parser.add_argument("--batch", default="1,8,32", help="batch sizes, separated by commas")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--mixed", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--kernels", choices=get_args(Kernels))
    parser.add_argument("--kv-cache-dtype", choices=get_args(KVCacheDType))
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--git", metavar="COMMIT")
    parser.add_argument("--json", metavar="FILE")
    given = vars(parser.parse_args(arguments))
    file, model, batch = given.pop("json"), given.pop("model"), given.pop("batch")
    own = ("kernels", "kv_cache_dtype", "max_num_batched_tokens", "max_num_seqs")
    engine_options = {name: given.pop(name) for name in own}
    try:
        batches = [int(part) for part in batch.split(",")]
    except ValueError:
        parser.error(f"--batch must be numbers separated by commas, got {batch!r}")
    try:
        made = bench_engine(model, batches=batches, engine_options=engine_options, **given)
        print(text_table(made))
        if file:
            record.write_record(file, made)
    except PowertrainError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
