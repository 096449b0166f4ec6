"""`powertrain export`: a model as one GGUF file, or back as a plain folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from powertrain.cli_options import JsonFile, Model
from powertrain.cli_output import progress_bars, say, write_json


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file that ends in .gguf, or a folder.")],
    type: Annotated[
        str,
        typer.Option(
            help="Of matrices. A .gguf file: f32, f16, bf16, q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, "
            "q3_k, q2_k, or as-is, which rounds nothing that a block can hold. A folder: f32, bf16, f16."
        ),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    json: JsonFile = None,
) -> None:
    """Write a model as a GGUF file, which llama.cpp runs, or as a plain folder of floats."""
    from powertrain.checkpoint.export_folder import export_folder
    from powertrain.checkpoint.export_gguf import export_gguf
    from powertrain.checkpoint.hub import resolve_model
    from powertrain.checkpoint.source import open_checkpoint

    run = export_gguf if out.suffix == ".gguf" else export_folder
    checkpoint = open_checkpoint(resolve_model(model))
    with progress_bars() as progress:
        report = run(checkpoint, out, type.lower(), overwrite=overwrite, progress=progress)
    print(report.summary())
    write_json(json, report.to_dict())
    say(f'next: powertrain generate {out} "Once upon a time"')
