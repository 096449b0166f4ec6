"""The verb `evaluate`: its flags, and where its record, its journal and its verdicts go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from powertrain.cli_options import Device, DType, JsonFile
from powertrain.cli_output import progress_bars, say, write_json
from powertrain.config import Kernels, KVCacheDType
from powertrain.types import PowertrainError

_TASKS, _GATES, _GREEDY = "Tasks", "Gates", "Greedy text"


def evaluate(
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="The model to judge.")],
    reference: Annotated[str, typer.Option(help="The model it should be like.")],
    data: Annotated[
        str, typer.Option(help="self: text sampled from the reference; a file of text or JSON lines; or none.")
    ] = "self",
    num_tokens: Annotated[int, typer.Option(min=0, help="About how many tokens to score; 0 for all.")] = 16384,
    window: Annotated[int, typer.Option(min=2, help="Tokens scored in one context.")] = 512,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Score this many rows at a time: few take the products of decoding.")
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Also put each layer of the candidate into the reference, alone.")
    ] = False,
    device: Annotated[Device, typer.Option(help="Where to run.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Activation type of the candidate.")] = "auto",
    kernels: Annotated[Kernels, typer.Option(help="CPU kernels of the candidate.")] = "auto",
    kv_cache_dtype: Annotated[KVCacheDType, typer.Option(help="KV cache type of the candidate.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the sampled text and of the bootstrap.")] = 0,
    task: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Multiple choice or last words as JSON lines (repeatable).", rich_help_panel=_TASKS
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="This many items of each task, by hash.", rich_help_panel=_TASKS)
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="Between query and answer; a space, or what the query asks for.", rich_help_panel=_TASKS),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep answers here and go on from it; else beside --json.", rich_help_panel=_TASKS
        ),
    ] = None,
    agreement: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare greedy continuations of these prompts.", rich_help_panel=_GREEDY),
    ] = None,
    acceptance: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The candidate as a draft: how much of the reference's greedy text after these prompts it guesses.",
            rich_help_panel=_GREEDY,
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many, from the first.", rich_help_panel=_GREEDY)] = 50,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=LIMIT",
            help="max-kl, min-top1, max-ppl-ratio or max-flips; a broken one is exit status 1 (repeatable).",
            rich_help_panel=_GATES,
        ),
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Score text that the candidate was calibrated on all the same.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """How far a model is from another: KL divergence, agreement, perplexity, tasks, with 95 % intervals."""
    from powertrain.compress.manifest import MANIFEST_FILE, update_manifest
    from powertrain.measure.gates import parse_gates
    from powertrain.measure.judge import judge

    for flag, value in (("--limit", limit), ("--separator", separator), ("--resume", resume)):
        if value is not None and not task:
            raise PowertrainError(f"{flag} goes with --task")
    gates = parse_gates(gate or ())
    # beside the record, and gone once that is whole; one that was named stays
    beside = json.with_name(f"{json.name}.journal") if json is not None and task and resume is None else None
    with progress_bars() as progress:
        found = judge(
            candidate,
            reference,
            data=data,
            num_tokens=num_tokens or None,
            window=window,
            chunk=chunk,
            per_layer=per_layer,
            tasks=task or (),
            limit=limit,
            separator=separator,
            journal=resume or beside,
            agreement=agreement,
            acceptance=acceptance,
            num_prompts=prompts,
            gates=gates,
            device=device,
            dtype=dtype,
            kernels=kernels,
            kv_cache_dtype=kv_cache_dtype,
            seed=seed,
            allows_overlap=allow_overlap,
            progress=progress,
        )
    print(found.text())
    for overlap in found.overlaps:
        say(f"warning: {overlap}")
    if found.evaluation is not None:
        tokens, windows = found.evaluation.num_tokens, found.evaluation.num_windows
        say(f"{tokens:,} tokens in {windows} windows; intervals are 95 %")
    if found.layers is not None:
        turned = "; the candidate's stream is turned back, as it is rotated" if found.layers.is_turned else ""
        say(f"KL by part on {found.layers.num_tokens:,} tokens, at the end of the reference{turned}")
    if found.tasks is not None:
        say("tasks in percent; ± is a standard error, [] the paired 95 % interval of candidate minus reference")
        if found.tasks.num_resumed:
            say(f"{found.tasks.num_resumed} answers were there from an earlier run")
    write_json(json, found.to_dict())
    if beside is not None:
        beside.unlink(missing_ok=True)
    if (Path(candidate) / MANIFEST_FILE).is_file():
        update_manifest(candidate, **found.manifest_entries())
        say(f"kept in {Path(candidate) / MANIFEST_FILE}")
    for verdict in found.verdicts:
        say(str(verdict))
    if not found.is_passed:
        raise typer.Exit(1)
