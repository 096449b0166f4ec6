"""Any checkpoint as one GGUF file that llama.cpp and others run: which type each tensor gets, and what that rounds.

Blocks that fit are moved, not made: those of a GGUF file of the wanted type, and integers that were rounded to a grid
that a type has. What else was quantized is rounded a second time, which is told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from powertrain.checkpoint.gguf import GGUFCheckpoint
from powertrain.checkpoint.gguf_blocks import BLOCKS
from powertrain.checkpoint.gguf_encode import encode
from powertrain.checkpoint.gguf_integers import encode_integers, half_error, type_of_integers
from powertrain.checkpoint.gguf_metadata import (
    ROPE_FACTORS,
    gguf_name,
    has_interleaved_rows,
    interleave_rows,
    metadata_from_config,
    rope_factors,
)
from powertrain.checkpoint.gguf_write import FILE_TYPE, Blocks, write_gguf
from powertrain.checkpoint.load import EMBEDDING
from powertrain.checkpoint.plain import read_weight, weight_shapes
from powertrain.checkpoint.quantization_config import HEAD
from powertrain.checkpoint.quantized import QuantizedMatrix
from powertrain.checkpoint.source import Checkpoint
from powertrain.checkpoint.tokenizer_to_gguf import tokenizer_metadata
from powertrain.model.families import ModelConfig, model_config
from powertrain.model.weights import IntWeight
from powertrain.types import PowertrainError

AS_IS = "as-is"
TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k")
FLOATS = ("F32", "F16", "BF16")
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that 256 does not divide: a type of 32 weights with no fewer bits, as llama.cpp chooses (where it takes
IQ4_NL, Q4_0, which is as large). Rows that 32 does not divide stay F16."""
HEAD_TYPE = "Q6_K"
"""llama.cpp's choice for the head, or for the embedding that is one too: it is read by every token."""
UNFITTING_TYPE = "Q8_0"
"""What `as-is` gives to matrices whose numbers no type holds."""
SPECIFIC_KEYS = (FILE_TYPE, "general.alignment", "split.")
STORED_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Progress = Callable[[str, float, float | None], None]
"""Called as (what, done, total)."""


@dataclass(slots=True)
class GGUFReport:
    """What an export did. `types` counts matrices by type, `notes` are lines about what was rounded or replaced.

    moved: matrices whose blocks or integers are the source's own; rounded: quantized before, and now a second time.
    """

    out: Path
    nbytes: int = 0
    types: Counter[str] = field(default_factory=Counter)
    moved: list[str] = field(default_factory=list)
    rounded_again: list[str] = field(default_factory=list)
    replaced: Counter[str] = field(default_factory=Counter)
    half_errors: dict[str, float] = field(default_factory=dict)
    loses_input_rounding: bool = False

    @property
    def notes(self) -> list[str]:
        lines = [f"{text}: {count} matrices" for text, count in self.replaced.items()]
        if self.moved:
            lines.append(f"blocks or integers moved as they are: {len(self.moved)} matrices")
        if self.half_errors:
            change = f"relative change up to {max(self.half_errors.values()):.1e}"
            lines.append(f"scales or minima rounded to float16, {change}: {len(self.half_errors)} matrices")
        if self.rounded_again:
            lines.append(f"quantized before and rounded a second time: {len(self.rounded_again)} matrices")
        if self.loses_input_rounding:
            lines.append("the source rounds activations; a GGUF file does not say so, the reader decides")
        return lines

    def summary(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.types.most_common())
        return "\n".join([f"wrote {self.out}: {self.nbytes:,} bytes, matrices: {counts}", *self.notes])

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1, "kind": "export", "out": str(self.out), "bytes": self.nbytes} | {
            "types": dict(self.types), "moved": self.moved, "rounded_again": self.rounded_again, "notes": self.notes
        }  # fmt: skip


def export_gguf(
    checkpoint: Checkpoint, out: Path, type_name: str, *, overwrite: bool = False, progress: Progress | None = None
) -> GGUFReport:
    """Write `checkpoint` to the file `out` with its matrices as `type_name`, one of `TYPES` or `as-is`.

    One tensor is in memory at a time. Raises `PowertrainError` naming the tensor, config key or file at fault.
    """
    if type_name not in (*TYPES, AS_IS):
        raise PowertrainError(f"--type {type_name!r} is unknown; known: {', '.join((*TYPES, AS_IS))}")
    config = model_config(checkpoint.config)
    report = GGUFReport(out)
    exporter = _Exporter(checkpoint, config, type_name.upper() if type_name != AS_IS else None, report)
    shapes = weight_shapes(config)
    names = {gguf_name(name): name for name in shapes}
    factors = rope_factors(config)

    def tensors() -> Iterator[tuple[str, Blocks]]:
        if factors is not None:
            yield ROPE_FACTORS, ("F32", encode("F32", factors.view(1, -1)))
        for done, (stored_name, name) in enumerate(names.items()):
            yield stored_name, exporter.blocks(name, shapes[name])
            if progress is not None:
                progress("export", done + 1, len(names))

    stored_shapes = {stored_name: shapes[name] for stored_name, name in names.items()}
    if factors is not None:
        stored_shapes = {ROPE_FACTORS: tuple(factors.shape), **stored_shapes}
    write_gguf(out, _metadata(checkpoint, config), stored_shapes, tensors(), overwrite)
    report.nbytes = Path(out).stat().st_size
    return report


def _metadata(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
    """A GGUF file's own keys, which may say more than is translated here; else config and tokenizer in its words."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return {key: value for key, value in checkpoint.metadata.items() if not key.startswith(SPECIFIC_KEYS)}
    name = checkpoint.path.resolve().name
    return metadata_from_config(config, name) | tokenizer_metadata(checkpoint.path, config.vocab_size)


class _Exporter:
    """Turns one weight at a time into blocks and keeps account of what that rounded. `wanted` None is as it is."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, wanted: str | None, report: GGUFReport) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._wanted = wanted
        self._report = report

    def blocks(self, name: str, shape: tuple[int, ...]) -> Blocks:
        """Type and rows of a weight, in the order that llama.cpp wants them in."""
        if len(shape) == 1:
            vector = self._checkpoint.load(name).reshape(-1, 1)
            type_name, rows = "F32", self._encode(name, "F32", vector)
        else:
            type_name, rows = self._matrix(name, shape)
            self._report.types[type_name] += 1
        if has_interleaved_rows(self._config, name):
            rows = interleave_rows(rows, self._config.head_dim)
        return type_name, rows

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Blocks:
        target = None if self._wanted is None else self._type_for(name, shape[1])
        if isinstance(self._checkpoint, GGUFCheckpoint):
            stored, rows, _ = self._checkpoint.raw(name)
            if target is None or stored in (target, self._wanted):
                return self._move(name, stored, rows)
            return self._round(name, target, self._checkpoint.load(name), was_quantized=stored not in FLOATS)
        found = read_weight(self._checkpoint, name, shape)
        if isinstance(found, torch.Tensor):
            return self._round(name, target or STORED_FLOATS.get(found.dtype, "F32"), found, was_quantized=False)
        return self._quantized(name, target, found)

    def _quantized(self, name: str, target: str | None, matrix: QuantizedMatrix) -> Blocks:
        self._report.loses_input_rounding |= matrix.rounds_input
        weight = matrix.weight
        fitting = type_of_integers(weight) if isinstance(weight, IntWeight) else None
        if (
            isinstance(weight, IntWeight)
            and fitting is not None
            and (target is None or fitting in (target, self._wanted))
        ):
            if error := half_error(weight):
                self._report.half_errors[name] = error
            return self._move(name, fitting, encode_integers(fitting, weight))
        return self._round(name, target or UNFITTING_TYPE, weight.dequantize(), was_quantized=True)

    def _type_for(self, name: str, columns: int) -> str:
        """The wanted type, or what takes its place in this matrix."""
        assert self._wanted is not None
        is_head = name.startswith(HEAD) or (self._config.ties_embeddings and name.startswith(EMBEDDING))
        chosen = HEAD_TYPE if is_head and self._wanted not in (*FLOATS, "Q8_0") else self._wanted
        found = chosen
        if columns % BLOCKS[found][1]:
            found = FALLBACKS.get(found, "F16")
        if columns % BLOCKS[found][1]:
            found = "F16"
        if is_head and chosen != self._wanted:
            self._report.replaced[f"{found} for the head"] += 1
        elif found != chosen:
            self._report.replaced[f"{found} for {chosen} in rows of {columns}, which blocks do not divide"] += 1
        return found

    def _move(self, name: str, type_name: str, rows: np.ndarray) -> Blocks:
        if type_name not in FLOATS:
            self._report.moved.append(name)
        return type_name, rows

    def _round(self, name: str, type_name: str, weight: torch.Tensor, was_quantized: bool) -> Blocks:
        if was_quantized and type_name != "F32":
            self._report.rounded_again.append(name)
        return type_name, self._encode(name, type_name, weight)

    def _encode(self, name: str, type_name: str, weight: torch.Tensor) -> np.ndarray:
        try:
            return encode(type_name, weight)
        except PowertrainError as error:
            raise PowertrainError(f"{self._checkpoint.path}: {name} {error}") from None
