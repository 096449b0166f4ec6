"""The comparison of tools that quantize: which rows are run again, what the tools are handed, workers that fail."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from powertrain.compress.recipe import load_recipe
from powertrain.types import PowertrainError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("peers", "quantize_job", "powertrain_quantizer")

WORKER = """
import sys
sys.path.insert(0, {folder!r})
import numpy as np
from quantize_job import serve

def work(job):
    print("a library greets")
    if job["seed"] == 1:
        raise ValueError("576 is not divisible by 128")
    room = np.ones(2**21)
    return {{"seconds": 0.5, "total": int(np.load(job["calibration"]).sum()), "room": room.nbytes}}

serve(work)
"""


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The benchmark's modules by name; they are no part of the package, so they leave again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    found = {"quantizers": importlib.import_module("peers.quantizers")}
    yield {**found, **{name: importlib.import_module(name) for name in MODULES[1:]}}
    for name in [name for name in sys.modules if name.partition(".")[0] in MODULES]:
        del sys.modules[name]


def test_rows_that_failed_run_again_and_those_without_calibration_once(modules: dict[str, ModuleType]) -> None:
    quantizers = modules["quantizers"]
    rows = quantizers.wanted(quantizers.all_rows(7), "* W4 g64 rtn,* W4 g64 gptq,*7 steps", quantizers.METHODS)
    assert [row.name.removeprefix("powertrain W4 g64 ") for row in rows[:3]] == ["rtn", "gptq", "autoround 7 steps"]
    results: list[dict[str, Any]] = []
    for row, seed in quantizers.missing(rows, (0, 1), results):
        failed = {"error": "out of memory"} if (row.method, seed) == ("gptq", 1) else {"kl_mean": 1.0}
        quantizers.put(results, {"name": row.name, "seed": seed, **failed})
    assert [row["seed"] for row in results if row["name"].endswith("rtn")] == [0, 0]
    again = list(quantizers.missing(rows, (0, 1), results))
    assert [(row.name, seed) for row, seed in again] == [
        ("powertrain W4 g64 gptq", 1),
        ("llm-compressor W4 g64 gptq", 1),
    ]
    quantizers.put(results, {"name": again[0][0].name, "seed": 1, "kl_mean": 2.0})
    assert [row.tool for row, _ in quantizers.missing(rows, (0, 1), results)] == ["llm-compressor"]
    assert len({(row["name"], row["seed"]) for row in results}) == len(results)


def test_a_record_of_other_settings_is_not_gone_on_with(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    measured_rows, path = modules["quantizers"].measured_rows, tmp_path / "record.json"
    assert measured_rows(path, {"config": {"length": 512}}) == []
    path.write_text(json.dumps({"config": {"length": 512}, "results": [{"name": "a"}]}))
    assert measured_rows(path, {"config": {"length": 512}}) == [{"name": "a"}]
    with pytest.raises(PowertrainError, match="another config"):
        measured_rows(path, {"config": {"length": 64}})
    with pytest.raises(PowertrainError, match=r"no row of powertrain has such a name"):
        modules["quantizers"].wanted(modules["quantizers"].all_rows(7), "gptq", ["powertrain"])


def test_the_best_of_each_are_compared_in_pairs_over_seeds(modules: dict[str, ModuleType]) -> None:
    def row(name: str, tool: str, kl_windows: list[float], **more: Any) -> dict[str, Any]:
        return {"name": name, "tool": tool, "scheme": "W4 g64", "kl_windows": kl_windows, **more}

    rows = [
        row("ours", "powertrain", [0.1, 0.4]),
        row("ours", "powertrain", [0.3, 0.4]),
        row("our lucky seed", "powertrain", [0.1, 0.1]),
        row("our lucky seed", "powertrain", [0.9, 0.9]),
        row("theirs", "llm-compressor", [0.4, 0.6]),
        row("their worse one", "llm-compressor", [0.4, 0.7]),
        {"name": "failed", "tool": "autoround", "scheme": "W4 g64", "error": "no"},
    ]
    [found] = modules["quantizers"].comparisons(rows)
    assert (found["ours"], found["peer"]) == ("ours", "theirs")
    assert found["ratio"] == pytest.approx(0.3 / 0.5)
    # both windows say -0.2, so every draw of them does: the spread between windows is no error of a pair
    assert [found["kl_mean_difference"], *found["interval"]] == pytest.approx([-0.2] * 3)


def test_every_row_of_ours_is_a_recipe_of_its_scheme(modules: dict[str, ModuleType]) -> None:
    quantizers = modules["quantizers"]
    rows = [row for row in quantizers.all_rows(7) if row.tool == quantizers.OURS]
    for row in rows:
        scheme = quantizers.SCHEMES[row.scheme]
        recipe = load_recipe({"steps": modules["powertrain_quantizer"].recipe_steps(scheme, row.options)})
        [step] = recipe.steps
        assert recipe.is_calibrated == row.is_calibrated
        assert (step.method, step.observer) == (row.options["round"], row.options["observer"])
        assert {key: getattr(step.scheme, key) for key in scheme} == scheme
        assert step.scheme.symmetric
    assert len({row.name for row in rows}) == len(rows)


def test_a_worker_says_what_it_used_or_why_it_failed(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    script, ids = tmp_path / "worker.py", tmp_path / "ids.npy"
    script.write_text(WORKER.format(folder=str(BENCHMARKS / "peers")))
    np.save(ids, np.arange(6).reshape(2, 3))
    ask, job = modules["quantize_job"].ask, {"calibration": str(ids), "seed": 0, "threads": 1}
    held = np.ones(2**24)  # 128 MiB of ours are none of the worker's
    found = ask(Path(sys.executable), script, job, tmp_path)
    assert found["total"] == 15
    assert found["process_seconds"] > 0
    assert found["room"] < found["peak_rss_bytes"] < held.nbytes
    with pytest.raises(RuntimeError, match=r"worker.py ended with status 1: .*576 is not divisible by 128"):
        ask(Path(sys.executable), script, {**job, "seed": 1}, tmp_path)
