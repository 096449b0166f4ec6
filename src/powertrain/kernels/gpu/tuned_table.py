"""Launch settings that were measured, as data: one JSON file for each kind of GPU, by product, shape and rows.

`benchmarks/tune_gpu.py` writes them. Nothing is measured while serving: a shape without an entry takes a guess.
"""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "tuned"
ROWS = (16, 32, 64, 128, 256)
"""Most rows of an entry; a product takes that of the next larger number."""

FEW_ROWS = 8
"""Products of up to so many rows may have entries of their own; without one they take that of 16."""

Key = tuple[int, int, int, bool]


def rows_of_entry(num_rows: int) -> int | None:
    """The number of rows that a product of `num_rows` is looked up by; None where it has too many."""
    return next((rows for rows in ROWS if num_rows <= rows), None)


def measured(
    product: str, device: torch.device, out_features: int, in_features: int, num_rows: int, is_gated: bool
) -> dict[str, Any] | None:
    """The settings of one product, `dense_linear bfloat16` say; None where nothing was measured."""
    key = (out_features, in_features, FEW_ROWS, is_gated)
    few = entry(product, device, key) if num_rows <= FEW_ROWS else None
    rows = rows_of_entry(num_rows)
    return few or (None if rows is None else entry(product, device, (out_features, in_features, rows, is_gated)))


def entry(product: str, device: torch.device, key: Key) -> dict[str, Any] | None:
    """What the table holds for exactly these sizes."""
    return of_device(device).get(product, {}).get(key) if device.type == "cuda" else None


def of_device(device: torch.device) -> dict[str, dict[Key, dict[str, Any]]]:
    """The table of a device, one object for all who ask."""
    return _of_index(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _of_index(index: int) -> dict[str, dict[Key, dict[str, Any]]]:
    file = FOLDER / file_name(torch.device("cuda", index))
    if not file.exists():
        logger.info("no measured settings for %s: the kernels run with guessed ones", file.stem)
        return {}
    return read(file)


def file_name(device: torch.device) -> str:
    """That of a device's settings."""
    return torch.cuda.get_device_name(device).replace(" ", "_") + ".json"


def read(file: Path) -> dict[str, dict[Key, dict[str, Any]]]:
    """All entries of a file, by product and key."""
    return {
        product: {(entry["out"], entry["in"], entry["rows"], entry["gated"]): entry for entry in entries}
        for product, entries in json.loads(file.read_text()).items()
    }


def write(file: Path, found: dict[str, dict[Key, dict[str, Any]]]) -> None:
    """The inverse of `read`, an entry a line."""
    products = []
    for product, entries in sorted(found.items()):
        lines = ",\n".join(f"    {json.dumps(entry)}" for _, entry in sorted(entries.items()))
        products.append(f"  {json.dumps(product)}: [\n{lines}\n  ]")
    file.write_text("{\n" + ",\n".join(products) + "\n}\n")
