"""Every long verb, killed and interrupted on its way: an output is whole or absent, and a rerun succeeds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_builders import TINY_TEXT
from powertrain.checkpoint.unfinished import is_abandoned, locked, remove_leftovers, set_aside, under_way

NUM_KILLS = 3
QUANTIZED = {"match": "Linear", "scheme": "W4A16", "group_size": 32}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "rtn": [QUANTIZED],
    "gptq": [{**QUANTIZED, "method": "gptq"}],
    "autoround": [{**QUANTIZED, "method": "autoround", "iterations": 3}],
    "awq": [{"method": "awq"}, QUANTIZED],
    "rotate": [{"method": "rotate"}],
    "smoothquant": [{"method": "smoothquant"}, {"match": "Linear", "scheme": "W8A8"}],
    "prune-depth": [{"method": "prune_depth", "keep": 1}],
    "sparsify": [{"method": "sparsify", "kind": "wanda"}],
}
OTHERS = ("budget", "distill", "distill-stored", "evaluate", "export-gguf", "export-folder")


def cases(model: str, text: Path, folder: Path) -> dict[str, tuple[list[str], str]]:
    """Each verb's arguments and the name of its output."""
    look = ["--calibration", str(text), "--calibration-samples", "2", "--calibration-length", "16"]
    made: dict[str, tuple[list[str], str]] = {}
    for name, steps in RECIPES.items():
        recipe = folder / f"{name}.json"
        recipe.write_text(json.dumps({"steps": steps}))
        made[name] = ["compress", model, "OUT", "--recipe", str(recipe), *look], "model"
    window = ["--num-tokens", "128", "--window", "32", "--kernels", "reference"]
    task = folder / "task.jsonl"
    rows = ({"query": f"the sun {at}", "choices": [" said", " went"], "gold": at % 2} for at in range(6))
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = ["--target-bits", "12", "--formats", "W4A16:32,W8A16:channel"]
    record = ["--json", "OUT"]
    train = ["--steps", "4", "--length", "16", "--batch-size", "2", "--evaluate-every", "2"]
    return {
        **made,
        "budget": (["budget", model, "--out", "OUT", *look, *target], "recipe.yaml"),
        "distill": (["distill", model, model, "OUT", "--data", str(text), *train], "model"),
        "distill-stored": (["distill", model, model, "OUT", "--data", str(text), *train, "--top-k", "4"], "model"),
        "evaluate": (
            ["evaluate", model, "--reference", model, "--data", str(text), *window, "--task", str(task), *record],
            "record.json",
        ),
        "export-gguf": (["export", model, "OUT", "--type", "q8_0"], "model.gguf"),
        "export-folder": (["export", model, "OUT", "--type", "bf16"], "model"),
    }


@pytest.fixture(scope="module")
def results(tiny_model_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("interrupted")
    text = folder / "text.txt"
    text.write_text(TINY_TEXT * 4, encoding="utf-8")
    given = json.dumps(cases(str(tiny_model_dir("llama")), text, folder))
    main = Path(__file__).with_name("interruption_main.py")
    done = subprocess.run(
        [sys.executable, str(main), str(folder), given, str(NUM_KILLS)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", [*RECIPES, *OTHERS])
def test_nothing_is_half_there_and_a_rerun_succeeds(results: dict[str, Any], name: str):
    found = results[name]
    assert "failed" not in found, found["failed"]
    assert not found["wrong"]
    assert found["num_cut"] > 0, "no run was cut: the kills came too late"
    # one leftover, and what the next run goes on from (training, a journal), however often it is killed
    assert 1 <= found["most_litter"] <= 2
    assert (found["last_status"], found["is_whole"]) == (0, True), found["log"]
    assert found["left"] == []


HOLD = """
import sys, time
from pathlib import Path
from powertrain.checkpoint.unfinished import under_way
with under_way(Path(sys.argv[1]), is_folder=True):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_another_process_writes_is_left_alone_until_it_is_killed(tmp_path: Path):
    final = tmp_path / "model"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(final)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (held,) = tmp_path.iterdir()
        assert held.name.startswith(".model.")
        remove_leftovers(final)
        with under_way(final, is_folder=True):
            assert held.exists()
        other.kill()
    assert is_abandoned(held)
    with under_way(final, is_folder=True) as own:
        assert list(tmp_path.iterdir()) == [own]
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_had_set_aside_comes_back(tmp_path: Path):
    final, old = tmp_path / "model", tmp_path / ".model.0a0a0a0a.old"
    old.mkdir()
    (old / "weights").write_text("mine")
    with locked(old):
        remove_leftovers(final)
        assert not final.exists()
    remove_leftovers(final)
    assert (final / "weights").read_text() == "mine"
    old.mkdir()
    remove_leftovers(final)
    assert list(tmp_path.iterdir()) == [final]
    with pytest.raises(OSError, match="busy"), set_aside(final):
        raise OSError("busy")
    assert (final / "weights").read_text() == "mine"
