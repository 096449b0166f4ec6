"""The verb `distill`: its flags, and the training settings they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powertrain.cli_options import Device, DType, JsonFile
from powertrain.cli_output import progress_bars, say, write_json

if TYPE_CHECKING:
    from powertrain.distill.on_policy import OnPolicy

Trained = Literal["scales", "weights"]
Loss = Literal["forward-kl", "reverse-kl", "jsd"]
_END, _LOSS, _TEXT, _RATE, _OWN = "When it ends", "Loss", "Text", "Steps", "The student's own text"


def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="The model to be like.")],
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="The model to train: a pruned one, say.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    data: Annotated[
        list[str], typer.Option(help="Training text: .txt or .jsonl, maybe .gz (repeatable).", rich_help_panel=_TEXT)
    ],
    held_out: Annotated[
        str | None, typer.Option(help="Text to watch; else the ends of --data.", rich_help_panel=_TEXT)
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.", rich_help_panel=_TEXT)] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a step.", rich_help_panel=_TEXT)] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the whole run.", rich_help_panel=_END)] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds of the whole run, over all commands.", rich_help_panel=_END)
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Seconds of this command; the same one then goes on.", rich_help_panel=_END)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many evaluations without a better held-out KL.", rich_help_panel=_END),
    ] = None,
    loss: Annotated[Loss, typer.Option(help="Divergence from the teacher.", rich_help_panel=_LOSS)] = "forward-kl",
    train: Annotated[
        Trained, typer.Option(help="Of a quantized STUDENT: its scales, or its integers too.", rich_help_panel=_RATE)
    ] = "scales",
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Store so many teacher logits of each position first.", rich_help_panel=_LOSS),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Divides the logits.", rich_help_panel=_LOSS)] = 1.0,
    beta: Annotated[float, typer.Option(help="jsd: the teacher's share of the mixture.", rich_help_panel=_LOSS)] = 0.5,
    learning_rate: Annotated[float, typer.Option(help="At its peak.", rich_help_panel=_RATE)] = 3e-4,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW's.", rich_help_panel=_RATE)] = 0.0,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between looks.", rich_help_panel=_RATE)] = 100,
    on_policy: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of the steps in which the student writes the text itself.", rich_help_panel=_OWN
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="What it is given of each window.", rich_help_panel=_OWN)
    ] = 32,
    refresh_every: Annotated[
        int, typer.Option(min=1, help="Steps that write with the same weights.", rich_help_panel=_OWN)
    ] = 1,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory: run blocks again in the backward pass.")
    ] = False,
    device: Annotated[Device, typer.Option(help="Where to run.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Type of the stored weights; auto is bfloat16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the windows' order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    json: JsonFile = None,
) -> None:
    """Train a student to give a teacher's distributions: heals a pruned model. Interrupted, it goes on when rerun.

    On several GPUs: torchrun --nproc-per-node N -m powertrain distill ...
    """
    import torch

    from powertrain.distill.losses import Divergence
    from powertrain.distill.parallel import launched
    from powertrain.distill.run import TextConfig
    from powertrain.distill.run import distill as run
    from powertrain.distill.trainer import Compute, TrainConfig

    is_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    config = TrainConfig(
        steps=steps,
        seconds=seconds,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        divergence=Divergence(loss, temperature, beta),
        evaluate_every=evaluate_every,
        patience=patience,
    )
    with launched("cuda" if is_gpu else "cpu") as processes, progress_bars() as progress:
        compute = Compute(
            device="cuda" if is_gpu else "cpu",
            dtype=torch.bfloat16 if is_gpu else torch.float32,
            recomputes=recompute,
            positions_at_once=8192 if is_gpu else 512,
            processes=processes,
        )
        report = run(
            teacher,
            student,
            out,
            data=data,
            held_out=held_out,
            text=TextConfig(length=length, batch_size=batch_size, seed=seed),
            config=config,
            compute=compute,
            dtype=dtype,
            max_seconds=max_seconds,
            trains=train,
            top_k=top_k,
            on_policy=None if on_policy is None else _sampling(on_policy, prompt_tokens, refresh_every),
            overwrite=overwrite,
            progress=progress if processes.is_first else None,
        )
    if not processes.is_first:
        return
    print(report.summary())
    write_json(json, report.manifest)
    if report.history.ended is not None:
        say(f"next: powertrain evaluate {out} --reference {teacher}")


def _sampling(share: float, num_prompt_tokens: int, refresh_every: int) -> OnPolicy:
    """The student writes by our own engine."""
    from powertrain.distill.on_policy import OnPolicy
    from powertrain.student_sampler import engine_refresh

    return OnPolicy(
        share=share,
        make_refresh=engine_refresh,
        num_prompt_tokens=num_prompt_tokens,
        refresh_every=refresh_every,
    )
