"""Text that a model was calibrated on is not scored by mistake."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from powertrain import cli
from powertrain.compress import calibrate, compress
from powertrain.compress.calibrate import NGRAM_FILE, NgramFilter
from powertrain.types import ModelFileError, PowertrainError

TinyModel = Callable[[str], Path]
Evaluate = Callable[..., tuple[str, str]]


def story(seed: int) -> str:
    source = random.Random(seed)
    return " ".join("".join(source.choices("abcdefghij", k=5)) for _ in range(400))


@pytest.fixture(scope="module")
def calibrated(tiny_model_dir: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overlap")
    (folder / "known.txt").write_text(story(0))
    step = {"match": "Linear", "method": "gptq", "scheme": "W4A16", "group_size": 32}
    compress(
        tiny_model_dir("llama"),
        folder / "w4",
        {"steps": [step]},
        calibration=folder / "known.txt",
        num_samples=8,
        length=128,
    )
    return folder / "w4"


@pytest.fixture
def evaluate(tiny_model_dir: TinyModel, calibrated: Path) -> Evaluate:
    def call(*options: str) -> tuple[str, str]:
        arguments = ["evaluate", str(calibrated), "--reference", str(tiny_model_dir("llama")), "--window", "64"]
        result = CliRunner().invoke(cli.app, [*arguments, "--num-tokens", "256", *options])
        if result.exception is not None:
            raise result.exception
        return result.stdout, result.stderr

    return call


def test_text_that_was_calibrated_on_is_refused(evaluate: Evaluate, calibrated: Path, tmp_path: Path) -> None:
    known = calibrated.parent / "known.txt"
    with pytest.raises(PowertrainError, match=r"known\.txt shares \d+ runs of 13 .* on \(known\.txt\)"):
        evaluate("--data", str(known))
    record = tmp_path / "made.json"
    out, err = evaluate("--data", str(known), "--allow-overlap", "--json", str(record))
    assert "kl_mean" in out
    assert "warning: " in err
    [overlap] = json.loads(record.read_text())["overlaps"]
    assert overlap["num_shared"] > 20
    assert overlap["model"] == str(calibrated)


def test_other_text_and_text_of_the_model_itself_pass(evaluate: Evaluate, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(story(1))
    assert "kl_mean" in evaluate("--data", str(tmp_path / "other.txt"))[0]
    assert "kl_mean" in evaluate("--data", "self")[0]


def test_items_that_were_calibrated_on_are_refused(evaluate: Evaluate, tmp_path: Path) -> None:
    def rows(text: str) -> list[dict[str, Any]]:
        return [{"query": text[at : at + 150], "choices": ["went", "waited"], "gold": 0} for at in range(0, 2200, 150)]

    for name, seed in (("seen", 0), ("unseen", 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(story(seed))))
    options = ("--data", "none", "--task")
    assert "acc" in evaluate(*options, str(tmp_path / "unseen.jsonl"))[0]
    with pytest.raises(PowertrainError, match=r"seen shares .* with the text that .* was calibrated on"):
        evaluate(*options, str(tmp_path / "seen.jsonl"))


def test_hashes_survive_the_disk_and_tell_no_text(calibrated: Path) -> None:
    known = NgramFilter.of_folder(calibrated)
    assert known is not None
    assert known.hashes.dtype == np.uint64
    assert 100 < len(known.hashes) <= 8 * (128 - 12)
    assert NgramFilter.of_folder(calibrated.parent) is None


def test_long_texts_keep_an_even_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(5).integers(0, 50_000, 4012).tolist()
    monkeypatch.setattr(calibrate, "MAX_HASHES", 1000)
    sampled = NgramFilter([ids])
    assert len(sampled.hashes) == 1000
    assert sampled.num_shared([ids]) == 1000
    # spread over the text: about a quarter of any part of it
    assert all(150 < sampled.num_shared([ids[at : at + 1012]]) < 350 for at in (0, 1000, 2000, 3000))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x93NUMPY\x01\x00"])
def test_damaged_hashes_are_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NGRAM_FILE).write_bytes(content)
    with pytest.raises(ModelFileError, match=NGRAM_FILE):
        NgramFilter.of_folder(tmp_path)


def test_hashes_of_another_kind_are_told(tmp_path: Path) -> None:
    np.save(tmp_path / NGRAM_FILE, np.zeros((2, 2)))
    with pytest.raises(ModelFileError, match="holds no hashes"):
        NgramFilter.of_folder(tmp_path)
