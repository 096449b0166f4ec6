"""The command line: one thin function per verb. Imports happen inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from powertrain import __version__
from powertrain.cli_budget import budget
from powertrain.cli_distill import distill
from powertrain.cli_evaluate import evaluate
from powertrain.cli_export import export
from powertrain.cli_options import (
    Device,
    DType,
    JsonFile,
    Method,
    Model,
    RandomFormat,
    RandomWeights,
    comma_numbers,
    engine_options,
    sampling_options,
)
from powertrain.cli_output import progress_bars, say, write_json
from powertrain.types import PowertrainError

app = typer.Typer(
    name="powertrain",
    help="Make a language model fast on the machine you have, prove what that cost, and serve it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure speed: the kernels, the engine alone, or a server under load.", no_args_is_help=True)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line. What the user can act on is one line on stderr and exit status 1; usage errors are 2."""
    try:
        app()
    except PowertrainError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"powertrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make a language model fast on the machine you have, prove what that cost, and serve it."""


@app.command()
def pull(name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2, or a Hugging Face id.")]) -> None:
    """Fetch a model into the cache and print where it is."""
    from powertrain.checkpoint import hub

    with progress_bars() as progress:
        path = hub.pull(name, progress=lambda done, total: progress(f"pull {name}", done, total))
    print(path)
    say(f'next: powertrain generate {name} "Once upon a time"')


@app.command()
@engine_options
@sampling_options
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")],
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Continue a prompt: the text streams to stdout, the speed is told on stderr."""
    from powertrain.llm import LLM
    from powertrain.types import SamplingParams

    params = SamplingParams(**{"max_tokens": 128, "temperature": 0.0, **sampling})
    text = sys.stdin.read() if prompt == "-" else prompt
    with LLM(model, **engine) as llm:
        print_stream(llm.stream(text, params))


@app.command()
@engine_options
@sampling_options
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Talk to a model in the terminal. The history is kept; /exit or Ctrl-D ends."""
    from powertrain.llm import LLM
    from powertrain.types import SamplingParams

    params = SamplingParams(**{"max_tokens": 512, "temperature": 0.6, "top_p": 0.95, **sampling})
    history = [{"role": "system", "content": system}] if system else []
    with LLM(model, **engine) as llm:
        while (question := _ask()) is not None:
            history.append({"role": "user", "content": question})
            answer = print_stream(llm.stream_chat(history, params))
            history.append({"role": "assistant", "content": answer})


def _ask() -> str | None:
    """The next thing to say, or None to end."""
    from rich.console import Console
    from rich.prompt import Prompt

    while True:
        try:
            text = Prompt.ask("[bold]you[/bold]", console=Console(stderr=True)).strip()
        except EOFError:
            return None
        if text == "/exit":
            return None
        if text:
            return text


def print_stream(pieces: Iterable[Any]) -> str:
    """Write text as it comes; then tokens per second and time to first token on stderr. Returns the whole text."""
    start = time.perf_counter()
    first = end = start
    num_tokens, text = 0, ""
    for piece in pieces:
        end = time.perf_counter()
        first = first if num_tokens else end
        num_tokens += len(piece.token_ids)
        text += piece.text
        print(piece.text, end="", flush=True)
    print()
    rate = (num_tokens - 1) / (end - first) if end > first else 0.0
    say(f"[{num_tokens} tokens, first after {(first - start) * 1000:.0f} ms, then {rate:.1f} tokens/s]")
    return text


@app.command()
@engine_options
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key that requests must bring (repeatable; or $POWERTRAIN_API_KEY).")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name of the model in the API.")] = None,
    max_queued_requests: Annotated[int, typer.Option(min=1, help="More than this many waiting get 503.")] = 256,
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="Seconds to finish requests in at SIGTERM.")] = 30,
    *,
    engine: dict[str, Any],
) -> None:
    """Serve a model over the OpenAI API."""
    from powertrain.checkpoint.hub import resolve_model
    from powertrain.config import EngineConfig, ServerConfig, api_keys_from_environment
    from powertrain.serve import run

    config = ServerConfig(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()) or api_keys_from_environment(),
        served_model_name=served_model_name or Path(model).name,
        max_queued_requests=max_queued_requests,
        shutdown_timeout_s=shutdown_timeout,
    )
    raise typer.Exit(run.serve(resolve_model(model), EngineConfig.from_options(**engine), config))


@app.command()
@engine_options
def explain(
    model: Model,
    random_weights: RandomWeights = False,
    format: RandomFormat = "none",
    json: JsonFile = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Tell who runs each op of a prompt and of decode steps on this machine, and why not a faster provider."""
    from powertrain.config import EngineConfig
    from powertrain.measure import explain as measure

    config = EngineConfig.from_options(**engine)
    made = measure.explain(model, config, random_weights=random_weights, format=format)
    print(measure.text(made))
    write_json(json, made)


@app.command()
def route(
    replica: Annotated[list[str], typer.Option(help="URL of a server (repeatable).")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8080,
    max_active_requests: Annotated[int, typer.Option(min=1, help="More than this many at once get 503.")] = 1024,
    progress_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds without a token after which a busy replica is taken out.")
    ] = 60,
) -> None:
    """Spread requests over several servers, each to where its prefix is cached, unless that one is busy."""
    from powertrain.serve import router
    from powertrain.serve.replica_health import HealthConfig

    health = HealthConfig(progress_timeout_s=progress_timeout)
    config = router.RouterConfig(host=host, port=port, max_active_requests=max_active_requests, health=health)
    router.route(replica, config)


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    recipe: Annotated[
        str, typer.Option(help="A preset (W4A16, W4A16_ASYM, W3A16, W8A16, W8A8, rotated, draft, ...) or a YAML file.")
    ] = "W4A16",
    group_size: Annotated[
        str | None, typer.Option(help="With a preset: weights that share a scale, or channel.", metavar="N|channel")
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="With a preset: how weights are rounded or, before that, scaled.")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            help="What FP8 and all methods but rtn look at: text files, or self: the model's own.", metavar="FILE|self"
        ),
    ] = None,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 128,
    calibration_length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the windows' places.")] = 0,
    dtype: Annotated[DType, typer.Option(help="Type of scales and of what stays dense.")] = "auto",
    device: Annotated[Device, typer.Option(help="Where to compute; auto takes CUDA for calibrated methods.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what each layer would get; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    json: JsonFile = None,
) -> None:
    """Quantize a model into a folder that this and other engines read (compressed-tensors)."""
    from powertrain.compress.driver import compress as run
    from powertrain.compress.driver import plan_compression
    from powertrain.compress.memory import memory_line
    from powertrain.compress.recipe import MODEL_STEPS, SCHEMES

    chosen: str | dict[str, Any] = recipe
    if group_size is not None or method is not None:
        if recipe not in SCHEMES:
            flag = "--group-size" if group_size is not None else "--method"
            raise PowertrainError(f"{flag} goes with a preset; in a recipe file it is a key of each step")
        before = [{"method": method}] if method in MODEL_STEPS else []
        step: dict[str, Any] = {"match": "Linear", "scheme": recipe, "method": "rtn" if before else method or "rtn"}
        if group_size is not None:
            step["group_size"] = group_size if group_size == "channel" else comma_numbers("--group-size", group_size)[0]
        chosen = {"steps": [*before, step]}
    if dry_run:
        plan = plan_compression(model, chosen, dtype=dtype)
        print(plan.table())
        print(memory_line(plan, calibration_samples * calibration_length))
        return
    with progress_bars() as progress:
        data: Any = calibration
        if calibration == ["self"]:
            from powertrain.measure.self_text import own_texts

            data = own_texts(model, calibration_samples, calibration_length, seed=seed, progress=progress)
        report = run(
            model,
            out,
            chosen,
            dtype=dtype,
            device=device,
            calibration=data,
            num_samples=calibration_samples,
            length=calibration_length,
            seed=seed,
            overwrite=overwrite,
            progress=progress,
        )
    print(report.summary())
    write_json(json, report.to_dict())
    say(f"next: powertrain evaluate {out} --reference {model}")


app.command()(budget)
app.command()(distill)
app.command()(evaluate)
app.command()(export)


@bench.command("kernels")
def bench_kernels(
    device: Annotated[Device, typer.Option(help="Where to run.")] = "auto",
    op: Annotated[list[str] | None, typer.Option(help="Only this op (repeatable, or a comma list).")] = None,
    shape: Annotated[
        str | None, typer.Option(help="Model whose sizes to take; llama-3.1-8b on CUDA, smollm2-135m on a CPU.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,8,32,64,256",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say why a provider did not run.")] = False,
    git: Annotated[str | None, typer.Option(help="Commit to record where git is missing.")] = None,
    json: JsonFile = None,
) -> None:
    """Each kernel at a model's sizes: checked against its reference, timed, beside the floor of this machine."""
    from rich.console import Console

    from powertrain.measure import bench_kernels as measure

    with progress_bars() as progress:
        made = measure.bench_kernels(
            device=device,
            ops=op or (),
            shape=shape,
            rows=comma_numbers("--rows", rows),
            threads=threads,
            git=git,
            progress=progress,
        )
    Console(width=100).print(measure.table(made))
    if verbose:
        print("\n".join(measure.explanations(made)))
    write_json(json, made)
    if measure.num_wrong(made):
        raise typer.Exit(1)


@bench.command("engine")
@engine_options
def bench_engine(
    model: Model,
    random_weights: RandomWeights = False,
    format: RandomFormat = "none",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,32",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 1024,
    output: Annotated[int, typer.Option(min=1, help="Output tokens.")] = 128,
    mixed: Annotated[int, typer.Option(min=0, help="Also this many requests of mixed lengths.")] = 0,
    git: Annotated[str | None, typer.Option(help="Commit to record where git is missing.")] = None,
    json: JsonFile = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Prefill and decode speed of the engine alone, beside the floor of this machine."""
    from powertrain.measure import bench as measure

    own = {name: engine.pop(name) for name in ("device", "dtype", "threads", "seed") if name in engine}
    with progress_bars() as progress:
        made = measure.bench_engine(
            model,
            random_weights=random_weights,
            format=format,
            batches=comma_numbers("--batch", batch),
            prompt=prompt,
            output=output,
            mixed=mixed,
            git=git,
            engine_options=engine,
            progress=progress,
            **own,
        )
    print(measure.text_table(made))
    write_json(json, made)


@bench.command("serve")
def bench_serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server.")] = "http://127.0.0.1:8000",
    concurrency: Annotated[int | None, typer.Option(min=1, help="Closed loop: clients, one request each.")] = None,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests per second.")] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 64,
    duration: Annotated[float | None, typer.Option(help="Send for this many seconds instead.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Words in a prompt.")] = 128,
    output: Annotated[int, typer.Option(min=1, help="Output tokens.")] = 64,
    cancel_share: Annotated[float, typer.Option(min=0, max=1, help="Share of requests closed after a token.")] = 0,
    model: Annotated[str | None, typer.Option(help="Model name; the server's first if not given.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key of the server.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of prompts and arrivals.")] = 0,
    json: JsonFile = None,
) -> None:
    """Latency and throughput of a running server under load, as its clients see them."""
    from powertrain.measure import loadgen

    load = loadgen.Load(
        url=url.rstrip("/"),
        concurrency=8 if concurrency is None and rate is None else concurrency,
        rate=rate,
        num_requests=num_requests,
        duration_s=duration,
        prompt_words=prompt,
        max_tokens=output,
        cancel_share=cancel_share,
        model=model,
        api_key=api_key,
        seed=seed,
    )
    with progress_bars() as progress:
        made = loadgen.bench_serve(load, progress=progress)
    print(loadgen.text_table(made))
    write_json(json, made)


@app.command()
def roofline(
    model: Model,
    device: Annotated[Device, typer.Option(help="Which device to measure.")] = "auto",
    batch: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,32",
    context: Annotated[int, typer.Option(min=1, help="Tokens each sequence holds.")] = 1024,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")] = None,
    json: JsonFile = None,
) -> None:
    """Measure this machine's bandwidth and matrix peak, and the speed no engine can beat with this model on it."""
    from rich.console import Console

    from powertrain.measure import record
    from powertrain.measure import roofline as measure

    batches = comma_numbers("--batch", batch)
    card = measure.card(model, device=device, threads=threads, batches=batches, context=context)
    Console().print(card.table())
    write_json(json, record.new_record("roofline", **card.to_dict()))


@app.command()
def optimize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the winner, record.json and report.html.")],
    tpot_ms: Annotated[float | None, typer.Option(help="Most ms per output token.")] = None,
    ttft_ms: Annotated[float | None, typer.Option(help="Most ms to the first token.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Most KL divergence from MODEL, nats per token.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Most memory of the engine process, like 600MB.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    data: Annotated[str, typer.Option(help="self: text sampled from MODEL; or a file of text or JSON lines.")] = "self",
    num_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to judge fidelity on.")] = None,
    prompt: Annotated[int | None, typer.Option(min=1, help="Prompt tokens of a timed request.")] = None,
    output: Annotated[int | None, typer.Option(min=2, help="Output tokens of a timed request.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")] = None,
    device: Annotated[Device, typer.Option(help="Where to run.")] = "auto",
    json: JsonFile = None,
) -> None:
    """Try weight formats and engine settings here; write the fastest that meets the limits, and a report."""
    from rich.console import Console

    from powertrain.optimize.run import Effort
    from powertrain.optimize.run import optimize as run

    effort = {"num_tokens": num_tokens, "prompt": prompt, "output": output}
    with progress_bars() as progress:
        result = run(
            model,
            out,
            tpot_ms=tpot_ms,
            ttft_ms=ttft_ms,
            max_kl=max_kl,
            max_memory=max_memory,
            batch=batch,
            data=data,
            effort=Effort(**{name: value for name, value in effort.items() if value is not None}),
            threads=threads,
            device=device,
            progress=progress,
        )
    Console().print(result.table())
    print(result.summary())
    write_json(json, result.record)
    if not result.is_qualified:
        raise typer.Exit(1)
