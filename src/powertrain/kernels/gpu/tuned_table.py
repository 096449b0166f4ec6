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

Key = tuple[int, int, int, bool]


def rows_of_entry(num_rows: int) -> int | None:
    """The number of rows that a product of `num_rows` is looked up by; None where it has too many."""
    return next((rows for rows in ROWS if num_rows <= rows), None)


def measured(
    product: str, device: torch.device, out_features: int, in_features: int, num_rows: int, is_gated: bool
) -> dict[str, Any] | None:
    """The settings of one product, `dense_linear bfloat16` say; None where nothing was measured."""
    rows = rows_of_entry(num_rows)
    if device.type != "cuda" or rows is None:
        return None
    return of_device(device).get(product, {}).get((out_features, in_features, rows, is_gated))


def measured_of_one_row(
    product: str, device: torch.device, out_features: int, in_features: int, is_gated: bool
) -> dict[str, Any] | None:
    """As `measured`, of products that take a single row: their entries are for that alone."""
    if device.type != "cuda":
        return None
    return of_device(device).get(product, {}).get((out_features, in_features, 1, is_gated))


@cache
def of_device(device: torch.device) -> dict[str, dict[Key, dict[str, Any]]]:
    file = FOLDER / file_name(device)
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
