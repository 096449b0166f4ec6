"""Compressing takes memory for one block, not for the model: as the process itself counts it, and as --dry-run says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from memory_builders import build_many_layers, held_by_compress
from powertrain.compress import plan_compression
from powertrain.compress.memory import memory_line, memory_needed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

LENGTH, NUM_SAMPLES = 64, 16
IDS = [[(7 * at + 3 * row) % 512 for at in range(LENGTH)] for row in range(NUM_SAMPLES)]

HIDDEN, INNER = 192, 768
BLOCK_BYTES = 4 * (3 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)


def recipe(method: str) -> dict[str, Any]:
    return {"steps": [{"match": "Linear", "scheme": "W8A16", "method": method}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("many")

    def get(num_layers: int) -> Path:
        out = folder / str(num_layers)
        return out if out.exists() else build_many_layers(out, num_layers, hidden=HIDDEN, inner=INNER)

    return get


@pytest.mark.parametrize(("method", "num_layers"), [("rtn", 24), ("gptq", 6)])
def test_layers_that_are_done_hold_nothing(model: Any, tmp_path: Path, method: str, num_layers: int):
    options = {"recipe": recipe(method), "calibration": IDS, "length": LENGTH, "num_samples": NUM_SAMPLES}
    held = held_by_compress(model(num_layers), model(1), tmp_path / "out", **options)
    # the bytes written, a fourth of those read, would be the least that is kept by mistake; the first layer warms up
    done = len(held.along) // num_layers
    written = (num_layers - 2) * BLOCK_BYTES / 4
    assert held.along[-1] - held.along[done] < written / 4, held.along[::done]
    needed = memory_needed(plan_compression(model(num_layers), recipe(method)), LENGTH * NUM_SAMPLES)
    # how much of a short peak a watcher sees is chance, and some megabytes are Python's
    assert held.peak < 1.1 * needed + 4e6
    assert held.peak > needed / 3


def test_the_line_names_the_tokens_it_counts_on(model: Any):
    rounds, looks = (plan_compression(model(2), recipe(method)) for method in ("rtn", "gptq"))
    assert "calibration" not in memory_line(rounds, 8192)
    assert "with 8,192 tokens of calibration text" in memory_line(looks, 8192)
    assert memory_needed(looks, 16384) - memory_needed(looks, 8192) == 8192 * 4 * (2 * 192 + 768)
