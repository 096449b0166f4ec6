"""The verb `budget`: a recipe whose layers share out a size, a bit rate or a divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from powertrain.cli_options import Device, DType, JsonFile, Model
from powertrain.cli_output import progress_bars, say, write_json


def budget(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The recipe to write (YAML).")],
    calibration: Annotated[
        list[str], typer.Option(help="Text that the model must still predict, or self: its own.", metavar="FILE|self")
    ],
    target_bits: Annotated[float | None, typer.Option(help="Bits per weight, over all weights.")] = None,
    target_bytes: Annotated[int | None, typer.Option(help="Bytes of all tensors.")] = None,
    target_kl: Annotated[float | None, typer.Option(help="Predicted KL divergence, nats per token.")] = None,
    sensitivity: Annotated[
        Literal["fisher", "kl"], typer.Option(help="fisher: one backward pass; kl: every layer in every format.")
    ] = "fisher",
    formats: Annotated[
        str | None, typer.Option(metavar="SCHEME:SIZE,...", help="Formats to choose from, such as W4A16:64.")
    ] = None,
    method: Annotated[
        Literal["rtn", "gptq", "autoround"], typer.Option(help="What the recipe's steps round by.")
    ] = "rtn",
    calibration_samples: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 16,
    calibration_length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the windows' places and of drawn labels.")] = 0,
    dtype: Annotated[DType, typer.Option(help="Type of scales and of what stays dense.")] = "auto",
    device: Annotated[Device, typer.Option(help="Where to run.")] = "auto",
    json: JsonFile = None,
) -> None:
    """Choose the format of every layer so that a model of a given size diverges least; write it as a recipe."""
    from powertrain.compress.budget import FORMATS, Target
    from powertrain.compress.budget import budget as run
    from powertrain.measure.record import write_text_atomically

    target = Target(nbytes=target_bytes, bits=target_bits, kl=target_kl)
    with progress_bars() as progress:
        data: Any = calibration
        if calibration == ["self"]:
            from powertrain.measure.self_text import own_texts

            data = own_texts(model, calibration_samples, calibration_length, seed=seed, progress=progress)
        found = run(
            model,
            target,
            calibration=data,
            formats=formats.split(",") if formats is not None else FORMATS,
            sensitivity=sensitivity,
            method=method,
            dtype=dtype,
            device=device,
            num_samples=calibration_samples,
            length=calibration_length,
            seed=seed,
            progress=progress,
        )
    write_text_atomically(out, found.yaml())
    print(found.table())
    say(f"wrote {out}: {found.chosen.nbytes:,} bytes, predicted KL {found.chosen.kl:.6f}")
    write_json(json, found.to_dict())
    say(f"next: powertrain compress {model} OUT --recipe {out}")
