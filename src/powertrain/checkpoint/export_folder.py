"""Any checkpoint as a plain Hugging Face folder: every weight a float again, as tools that know no formats want it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from powertrain.checkpoint.plain import plain_weights, weight_shapes
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import Checkpoint
from powertrain.checkpoint.tokenizer_files import hugging_face_files
from powertrain.model.families import model_config
from powertrain.types import PowertrainError

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "dtype", "torch_dtype")

Progress = Callable[[str, float, float | None], None]
"""Called as (what, done, total)."""


@dataclass(frozen=True, slots=True)
class FolderReport:
    """What was written. `num_with_rounded_inputs`: matrices whose inputs the source rounds and the folder does not."""

    out: Path
    dtype: str
    num_tensors: int
    nbytes: int
    num_with_rounded_inputs: int

    def summary(self) -> str:
        lines = [f"wrote {self.out}: {self.num_tensors} tensors of {self.dtype}, {self.nbytes:,} bytes of weights"]
        if self.num_with_rounded_inputs:
            lines.append(f"activations are no longer rounded: {self.num_with_rounded_inputs} matrices")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1, "kind": "export", "out": str(self.out), "dtype": self.dtype, "bytes": self.nbytes} | {
            "num_tensors": self.num_tensors, "num_with_rounded_inputs": self.num_with_rounded_inputs
        }  # fmt: skip


def export_folder(
    checkpoint: Checkpoint, out: Path, type_name: str, *, overwrite: bool = False, progress: Progress | None = None
) -> FolderReport:
    """Write `checkpoint` to the folder `out` with every weight as `type_name`: f32, bf16 or f16.

    One tensor is read at a time. Raises `PowertrainError` naming the tensor or file at fault.
    """
    if type_name not in DTYPES:
        raise PowertrainError(f"--type {type_name} is for a .gguf file; a folder can be {', '.join(DTYPES)}")
    config = model_config(checkpoint.config)
    dtype = DTYPES[type_name]
    total = len(weight_shapes(config))
    counted: list[tuple[int, bool]] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight, rounds_input in plain_weights(checkpoint, config, dtype):
            yield name, weight
            counted.append((weight.nbytes, rounds_input))
            if progress is not None:
                progress("export", len(counted), total)

    written = {key: value for key, value in checkpoint.config.items() if key not in QUANTIZATION_KEYS}
    written["torch_dtype"] = str(dtype).removeprefix("torch.")
    files: dict[str, bytes | str] = dict(hugging_face_files(checkpoint.path))
    if checkpoint.generation_config:
        files["generation_config.json"] = json.dumps(checkpoint.generation_config, indent=2) + "\n"
    write_checkpoint(out, written, tensors(), files, overwrite=overwrite)
    return FolderReport(
        out=out,
        dtype=written["torch_dtype"],
        num_tensors=len(counted),
        nbytes=sum(nbytes for nbytes, _ in counted),
        num_with_rounded_inputs=sum(rounds_input for _, rounds_input in counted),
    )
