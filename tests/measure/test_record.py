from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from powertrain.measure import record
from powertrain.types import PowertrainError


def test_a_record_says_where_it_comes_from() -> None:
    made = record.new_record("engine", git="abc123", model="tiny", results=[])
    assert made["schema"] == 1
    assert made["kind"] == "engine"
    assert made["git"] == {"commit": "abc123", "dirty": None}
    assert made["device"]["cores"] >= 1
    assert made["device"]["memory_bytes"] > 2**28
    assert made["software"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "torch" in made["software"]
    assert "transformers" not in made["software"]
    assert made["model"] == "tiny"
    assert record.device_line(made["device"])


def test_git_state_is_the_commit_of_the_source_tree() -> None:
    source = Path(record.__file__).parent
    asked = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    tracked = subprocess.run(["git", "-C", source, "ls-files", "--error-unmatch", "record.py"], capture_output=True)
    expected = asked.stdout.strip() if asked.returncode == 0 and tracked.returncode == 0 else None
    assert record.git_state()["commit"] == expected


def test_round_trip_and_replacement(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "record.json"
    record.write_record(path, {"schema": 1, "kind": "engine", "note": "größer"})
    record.write_record(path, {"schema": 1, "kind": "engine", "note": "später"})
    assert record.read_record(path)["note"] == "später"
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_a_failed_write_leaves_the_old_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record.write_record(path, {"schema": 1, "kind": "engine"})
    with pytest.raises(ValueError):
        record.write_record(path, {"schema": 1, "kind": "engine", "bad": float("nan")})
    assert json.loads(path.read_text()) == {"schema": 1, "kind": "engine"}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_an_unwritable_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PowertrainError, match=r"record\.json"):
        record.write_record(tmp_path / "file" / "record.json", {})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99, "kind": "engine"}'])
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(PowertrainError, match=r"other\.json"):
        record.read_record(path)


def test_compare_matches_rows_by_what_was_measured() -> None:
    before = {
        "schema": 1,
        "kind": "engine",
        "startup_s": 2.0,
        "results": [{"batch": 1, "prompt": 8, "step_ms": 4.0}, {"batch": 2, "prompt": 8, "step_ms": 5.0}],
    }
    after = {
        "schema": 1,
        "kind": "engine",
        "startup_s": 1.0,
        "results": [{"batch": 2, "prompt": 8, "step_ms": 10.0}, {"batch": 4, "prompt": 8, "step_ms": 20.0}],
    }
    rows = {row.name: row for row in record.compare(before, after)}
    assert set(rows) == {"startup_s", "results[batch=2 prompt=8] step_ms"}
    assert rows["startup_s"].ratio == 0.5
    assert rows["results[batch=2 prompt=8] step_ms"].ratio == 2.0
    assert rows["results[batch=2 prompt=8] step_ms"].before == 5.0


def test_compare_refuses_other_kinds_and_survives_zero() -> None:
    with pytest.raises(PowertrainError, match=r"engine.*server"):
        record.compare({"kind": "engine"}, {"kind": "server"})
    (row,) = record.compare({"kind": "engine", "errors": 0}, {"kind": "engine", "errors": 3})
    assert row.ratio is None
