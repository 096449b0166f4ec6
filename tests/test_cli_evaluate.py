"""`powertrain evaluate` with tasks, gates and greedy text: what is printed, kept, resumed, and its exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from powertrain import cli
from powertrain.compress import compress
from powertrain.measure import tasks
from powertrain.types import PowertrainError

TinyModel = Callable[[str], Path]
Evaluate = Callable[..., tuple[int, str, str]]

ROWS = [
    {"query": f"The engine pulled {number} carts, so the sun", "choices": ["said nothing", "left"], "gold": number % 2}
    for number in range(6)
]


@pytest.fixture(scope="module")
def w4(tiny_model_dir: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gated") / "w4"
    recipe = {"steps": [{"match": "Linear", "scheme": "W4A16", "group_size": 32}]}
    compress(tiny_model_dir("llama"), out, recipe, dtype="float32")
    return out


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "carts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def evaluate(tiny_model_dir: TinyModel, w4: Path) -> Evaluate:
    def call(*options: str) -> tuple[int, str, str]:
        arguments = ["evaluate", str(w4), "--reference", str(tiny_model_dir("llama")), "--window", "64", *options]
        result = CliRunner().invoke(cli.app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return call


def test_tasks_alone(evaluate: Evaluate, task: Path, w4: Path, tmp_path: Path):
    made = tmp_path / "made.json"
    status, out, err = evaluate("--data", "none", "--task", str(task), "--limit", "4", "--json", str(made))
    assert status == 0, err
    head, acc, norm = out.splitlines()
    assert head.split() == ["task", "score", "items", "reference", "candidate", "difference", "flips"]
    assert acc.split()[:3] == ["carts", "acc", "4"]
    assert norm.split()[:3] == ["carts", "acc_norm", "4"]
    assert max(map(len, out.splitlines())) < 100
    record = json.loads(made.read_text())
    assert (record["kind"], record["tasks"][0]["num_items"], len(record["tasks"][0]["items"])) == ("tasks", 4, 4)
    assert "kl_mean" not in record
    assert {path.name for path in tmp_path.iterdir()} == {"made.json", "carts.jsonl"}, "the journal is gone"
    kept = json.loads((w4 / "powertrain.json").read_text())["tasks"]
    assert kept[0]["scores"] == record["tasks"][0]["scores"]
    assert "items" not in kept[0]


@pytest.mark.parametrize(
    ("gates", "status", "broken"),
    [
        (["max-kl=1000", "min-top1=0", "max-ppl-ratio=1e9", "max-flips=1"], 0, []),
        (["max-kl=1e-9"], 1, ["max-kl=1e-09"]),
        (["max-kl=1e-9", "min-top1=1", "max-flips=1"], 1, ["max-kl=1e-09", "min-top1=1"]),
    ],
)
def test_gates_set_the_exit_status(
    evaluate: Evaluate, task: Path, tmp_path: Path, gates: list[str], status: int, broken: list[str]
):
    made = tmp_path / "made.json"
    flags = [part for gate in gates for part in ("--gate", gate)]
    found, out, err = evaluate("--num-tokens", "256", "--task", str(task), *flags, "--json", str(made))
    assert found == status, err
    assert "kl_mean" in out
    assert "carts" in out
    lines = [line for line in err.splitlines() if " is broken: " in line]
    assert [line.split()[1] for line in lines] == broken
    assert all("95 % interval [" in line for line in lines)
    record = json.loads(made.read_text())
    assert record["kind"] == "evaluation"
    assert [row["is_met"] for row in record["gates"]].count(False) == len(broken)
    assert len(record["tasks"][0]["items"]) == 6


def test_an_interrupted_run_leaves_a_journal_and_no_record(
    evaluate: Evaluate, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = tmp_path / "made.json"
    options = ["--data", "none", "--task", str(task), "--json", str(made)]
    real, num_asked = tasks.answer, 0

    def dying(*given: Any) -> Any:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 5:
            raise RuntimeError("killed")
        return real(*given)

    monkeypatch.setattr(tasks, "answer", dying)
    with pytest.raises(RuntimeError, match="killed"):
        evaluate(*options)
    assert not made.exists()
    journal = tmp_path / "made.json.journal"
    assert len(journal.read_text().splitlines()) == 5
    with pytest.raises(PowertrainError, match=r"made\.json\.journal: holds results of another run: separator"):
        evaluate(*options, "--separator", "\n")
    status, _, err = evaluate(*options)
    assert status == 0
    assert "4 answers were there from an earlier run" in err
    assert not journal.exists()


def test_a_named_journal_stays(evaluate: Evaluate, task: Path, tmp_path: Path):
    options = ["--data", "none", "--task", str(task), "--resume", str(tmp_path / "kept")]
    assert evaluate(*options)[0] == 0
    assert "12 answers were there" in evaluate(*options)[2]


def test_greedy_text(evaluate: Evaluate, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the sun\nthe engine\nthe rain\n")
    made = tmp_path / "made.json"
    status, out, err = evaluate("--data", "none", "--agreement", str(prompts), "--prompts", "2", "--json", str(made))
    assert status == 0, err
    assert out.startswith("greedy text agrees for ")
    assert len(json.loads(made.read_text())["agreement"]["lengths"]) == 2
    status, out, err = evaluate("--data", "none", "--acceptance", str(prompts), "--prompts", "2", "--json", str(made))
    assert status == 0, err
    assert out.startswith("as a draft: ")
    assert len(json.loads(made.read_text())["acceptance"]["tokens_per_step"]) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none"], "--data none leaves nothing to compare"),
        (["--limit", "3"], "--limit goes with --task"),
        (["--resume", "x"], "--resume goes with --task"),
        (["--separator", " "], "--separator goes with --task"),
        (["--gate", "max-flips=0.1"], "--gate max-flips=0.1 needs a --task"),
        (["--gate", "kl=1"], "--gate must be a name and a limit"),
    ],
)
def test_flags_that_say_nothing_are_refused_before_any_work(evaluate: Evaluate, options: list[str], message: str):
    with pytest.raises(PowertrainError, match=message):
        evaluate(*options)
