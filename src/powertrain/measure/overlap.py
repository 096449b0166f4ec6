"""No model is judged on the text that it was calibrated on: runs of 13 tokens that both have in common are looked for.

A compressed folder keeps hashes of its calibration text (`compress/calibrate.NgramFilter`), not the text. The rule is
that of Brown et al. 2020 (arXiv 2005.14165, appendix C); folders without such hashes cannot be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from powertrain.compress.calibrate import NGRAM, NgramFilter
from powertrain.compress.manifest import MANIFEST_FILE, read_manifest
from powertrain.measure.scoring import Model
from powertrain.measure.task_data import Task
from powertrain.measure.task_scoring import encode_item
from powertrain.text_data import Window
from powertrain.types import PowertrainError


@dataclass(frozen=True, slots=True)
class Overlap:
    """`num_shared` runs of 13 tokens of `data`, in `num_items` of its windows or items, are `model`'s calibration."""

    data: str
    model: str
    calibration: str
    num_shared: int
    num_items: int

    def __str__(self) -> str:
        return (
            f"{self.data} shares {self.num_shared} runs of {NGRAM} tokens (in {self.num_items} windows or items) "
            f"with the text that {self.model} was calibrated on ({self.calibration})"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_overlap(data: str, items: Sequence[Sequence[Sequence[int]]], models: Sequence[Model]) -> list[Overlap]:
    """For each of `models` that keeps its calibration's hashes: what of it is in `items`, each some token sequences."""
    found = []
    for model in models:
        known = NgramFilter.of_folder(model.path) if model.path.is_dir() else None
        if known is None:
            continue
        counts = [known.num_shared(sequences) for sequences in items]
        if any(counts):
            found.append(Overlap(data, model.name, _calibration(model.path), sum(counts), sum(map(bool, counts))))
    return found


def _calibration(folder: Path) -> str:
    if not (folder / MANIFEST_FILE).is_file():
        return "unknown"
    calibration = read_manifest(folder).get("calibration")
    return str(calibration.get("source")) if isinstance(calibration, dict) else "unknown"


def scored_parts(windows: Sequence[Window]) -> list[list[tuple[int, ...]]]:
    """What is scored of each window: a context that was only given, such as a question, may stand in both."""
    return [[tuple(window.token_ids[window.num_context :])] for window in windows]


def task_parts(task: Task, model: Model, separator: str | None) -> list[tuple[tuple[int, ...], ...]]:
    """Each item with each of its answers, in the ids of `model`."""
    from powertrain.checkpoint.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(model.path)
    parts = []
    for item in task.items:
        try:
            parts.append(encode_item(item, tokenizer, None, separator).sequences)
        except PowertrainError as error:
            raise PowertrainError(f"{task.path}:{item.line}: {error}") from error
    return parts


def refuse_overlaps(overlaps: Sequence[Overlap], is_allowed: bool) -> None:
    """Raises `PowertrainError` naming data and calibration, unless it is allowed."""
    if overlaps and not is_allowed:
        raise PowertrainError(f"{overlaps[0]}: score other text or seed, or go on with --allow-overlap")
