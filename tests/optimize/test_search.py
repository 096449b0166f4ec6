from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from powertrain.optimize import run, space
from powertrain.optimize.search import Judges, install_winner, search, workspace
from powertrain.optimize.space import Fidelity, Format, Limits, Setting, Speed
from powertrain.types import PowertrainError

FORMATS = [Format("none"), Format("W8A16 channel", {"a": 1}), Format("W4A16 g64", {"b": 2})]
SETTINGS = [Setting("default"), Setting("other", {"max_num_batched_tokens": 256})]
KL = {"W8A16-channel": 0.002, "W4A16-g64": 0.12}
RATE = {"none": 20.0, "W8A16-channel": 40.0, "W4A16-g64": 60.0}


class FakeJudges:
    """Judges that answer from the tables above and remember what they were asked."""

    def __init__(self, source: Path, broken: str = "", stage: str = "") -> None:
        self.timed: list[str] = []
        self._source, self._broken, self._stage = source, broken, stage

    def _fail(self, path: Path, stage: str) -> None:
        if path.name == self._broken and stage == self._stage:
            raise PowertrainError(f"{stage} failed")

    def compress(self, out: Path, recipe: Mapping[str, Any]) -> None:
        self._fail(out, "compress")
        out.mkdir()
        (out / "config.json").write_text(json.dumps(dict(recipe)))

    def fidelity(self, path: Path) -> Fidelity:
        self._fail(path, "fidelity")
        kl = KL[path.name]
        return Fidelity(kl=kl, kl_low=kl, kl_high=kl, kl_small_batch=kl, top1_agreement=0.9, ppl_ratio=1.0)

    def speed(self, path: Path, settings: Sequence[Setting]) -> list[Speed]:
        name = "none" if path == self._source else path.name
        self._fail(path, "speed")
        self.timed.append(name)
        rates = [RATE[name] + index for index, _ in enumerate(settings)]
        return [
            Speed(ttft_ms=10, tpot_ms=1000 / r, output_tokens_per_s=r, memory_bytes=10**8, weight_bytes=1)
            for r in rates
        ]

    def judges(self) -> Judges:
        return Judges(self.compress, self.fidelity, self.speed)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def silent(what: str, done: float, total: float | None) -> None:
    pass


def test_speed_is_not_measured_where_fidelity_fails(source: Path, tmp_path: Path) -> None:
    fake = FakeJudges(source)
    with workspace(tmp_path / "out") as work:
        measured, choice = search(source, work, fake.judges(), FORMATS, SETTINGS, Limits(max_kl=0.05), silent)
    assert fake.timed == ["none", "W8A16-channel"]
    assert len(measured) == 6
    assert choice.winner is not None
    assert choice.winner.name == "W8A16 channel · other"
    assert choice.rejections["W4A16 g64 · default"] == ("KL 0.12 > --max-kl 0.05",)


def test_when_nothing_qualifies_everything_is_timed_for_the_advice(source: Path, tmp_path: Path) -> None:
    fake = FakeJudges(source)
    limits = Limits(max_kl=0.05, tpot_ms=20.0)
    with workspace(tmp_path / "out") as work:
        measured, choice = search(source, work, fake.judges(), FORMATS, SETTINGS, limits, silent)
    assert sorted(fake.timed) == sorted(["none", "W8A16-channel", "W4A16-g64"])
    assert all(candidate.speed for candidate in measured)
    assert choice.winner is None
    assert [str(r) for r in choice.relaxations] == [
        "--tpot-ms 25 would admit W8A16 channel · other",
        "--max-kl 0.13 would admit W4A16 g64 · default",
    ]


@pytest.mark.parametrize("stage", ["compress", "fidelity", "speed"])
def test_a_candidate_that_fails_is_a_row_with_its_reason(source: Path, tmp_path: Path, stage: str) -> None:
    fake = FakeJudges(source, broken="W4A16-g64", stage=stage)
    with workspace(tmp_path / "out") as work:
        _, choice = search(source, work, fake.judges(), FORMATS, SETTINGS, Limits(), silent)
    assert choice.rejections["W4A16 g64 · default"] == (f"{stage} failed",)
    assert choice.winner is not None
    assert choice.winner.format.name == "W8A16 channel"


def test_a_broken_model_is_not_chosen_without_limits(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(KL, "W4A16-g64", float("nan"))
    with workspace(tmp_path / "out") as work:
        _, choice = search(source, work, FakeJudges(source).judges(), FORMATS, SETTINGS, Limits(), silent)
    assert choice.winner is not None
    assert choice.winner.format.name == "W8A16 channel"


def test_the_winner_replaces_the_earlier_one_and_losers_are_deleted(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "model" / "old.safetensors").write_text("old")
    (out / "record.json").write_text("{}")
    with workspace(out) as work:
        _, choice = search(source, work, FakeJudges(source).judges(), FORMATS, SETTINGS, Limits(), silent)
        served = install_winner(choice, source, work, out)
    assert served == out / "model"
    assert [file.name for file in served.iterdir()] == ["config.json"]
    assert sorted(entry.name for entry in out.iterdir()) == ["model", "record.json"]


@pytest.mark.parametrize("limits", [Limits(max_kl=0.0), Limits(tpot_ms=0.001)])
def test_no_copy_is_made_of_the_model_as_it_is(source: Path, tmp_path: Path, limits: Limits) -> None:
    out = tmp_path / "out"
    with workspace(out) as work:
        _, choice = search(source, work, FakeJudges(source).judges(), FORMATS, SETTINGS, limits, silent)
        served = install_winner(choice, source, work, out)
    assert served == (source if limits.tpot_ms is None else None)
    assert list(out.iterdir()) == []
    assert source.is_dir()


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupted() -> None:
        with workspace(out) as work:
            (work / "big").write_text("weights")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(out.iterdir()) == []


def test_output_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs" / "model").mkdir(parents=True)
    for out, named in ((tmp_path / "file", "is a file"), (tmp_path / "theirs", "not a result")):
        with pytest.raises(PowertrainError, match=named):
            with workspace(out):
                pass
    assert (tmp_path / "theirs" / "model").is_dir()


def test_a_result_is_not_optimized_into_itself(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_model_dir("llama"))
    with pytest.raises(PowertrainError, match="another output folder"):
        run.optimize(tmp_path / "model", tmp_path)


def test_the_whole_way_on_a_tiny_model(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real compression, evaluation and engine; two formats, since each is timed in a process of its own."""
    from powertrain.config import EngineConfig
    from powertrain.engine.core import Engine

    kept = ("none", "W8A16 channel")
    monkeypatch.setattr(run, "formats", lambda config: [f for f in space.formats(config) if f.name in kept])
    effort = run.Effort(num_tokens=64, window=16, prompt=8, output=4)
    stages: set[str] = set()
    result = run.optimize(
        tiny_model_dir("llama"),
        tmp_path / "out",
        max_kl=1.0,
        max_memory="64GB",
        batch=2,
        threads=1,
        device="cpu",
        effort=effort,
        progress=lambda what, done, total: stages.add(what),
    )
    assert {"compress", "evaluate", "speed"} <= stages
    made = json.loads(result.record_path.read_text())
    assert made["kind"] == "optimize"
    assert [row["format"] for row in made["results"]] == ["none", "none", "W8A16 channel", "W8A16 channel"]
    quantized = made["results"][2]
    assert 0 < quantized["fidelity"]["kl"] < 0.1
    assert quantized["speed"]["weight_bytes"] < made["results"][0]["speed"]["weight_bytes"]
    assert quantized["speed"]["memory_bytes"] > 10**7
    assert made["results"][0]["fidelity"]["kl"] == 0.0
    assert sum(row["is_winner"] for row in made["results"]) == 1
    assert result.is_qualified
    assert result.serve_command is not None
    assert f"powertrain serve {result.model}" in result.serve_command
    assert "--kv-cache-memory-bytes" in result.serve_command
    assert not (tmp_path / "out" / ".work").exists()
    assert result.model is not None
    Engine.from_checkpoint(result.model, EngineConfig.from_options(device="cpu", num_blocks=8)).close()


def test_limits_nobody_can_meet_are_a_result_with_advice(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "formats", lambda config: space.formats(config)[:1])
    effort = run.Effort(num_tokens=32, window=16, prompt=8, output=4)
    result = run.optimize(
        tiny_model_dir("llama"), tmp_path / "out", max_memory="1MB", threads=1, device="cpu", effort=effort
    )
    assert not result.is_qualified
    assert result.serve_command is None
    assert "--max-memory" in result.summary()
    assert result.report_path.read_text().count("Nothing meets the limits") == 1
    assert not (tmp_path / "out" / "model").exists()
