"""The search: write each format, judge it, measure the survivors, choose, and put the winner in place.

Everything temporary lives in OUT/.work and is gone afterwards, also after an interrupt. OUT/model appears by a rename.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from powertrain.optimize.choice import Choice, broken_limits, choose
from powertrain.optimize.space import Fidelity, Format, Limits, Measured, Setting, Speed
from powertrain.types import PowertrainError

Progress = Callable[[str, float, float | None], None]
"""Called as (what, done, total)."""

REFERENCE_FIDELITY = Fidelity(kl=0.0, kl_low=0.0, kl_high=0.0, kl_small_batch=0.0, top1_agreement=1.0, ppl_ratio=1.0)


@dataclass(frozen=True, slots=True)
class Judges:
    """The three things done to a candidate. Values, so that the search can be tested without a model.

    `compress(out, recipe)` writes a checkpoint; `fidelity(checkpoint)` and `speed(checkpoint, settings)` measure one
    read back from disk. Each raises `PowertrainError` for a candidate that cannot be made or run.
    """

    compress: Callable[[Path, Mapping[str, Any]], None]
    fidelity: Callable[[Path], Fidelity]
    speed: Callable[[Path, Sequence[Setting]], list[Speed]]


def search(
    source: Path,
    work: Path,
    judges: Judges,
    formats: Sequence[Format],
    settings: Sequence[Setting],
    limits: Limits,
    progress: Progress,
) -> tuple[list[Measured], Choice]:
    """Measure every format under every setting and choose.

    Speed is not measured where fidelity fails already, unless nothing qualifies: then it is, so that the advice which
    limit to relax is a measured one. The checkpoints stay in `work`, one folder per format.
    """
    stages = _Stages(progress, len(formats))
    judged: list[tuple[Format, Path, Fidelity | None, str | None]] = []
    for format_ in formats:
        judged.append((format_, *_judge(source, work, judges, format_, stages)))
    measured: list[Measured] = []
    for format_, path, fidelity, failure in judged:
        unmeasured = [Measured(format=format_, setting=s, fidelity=fidelity, failure=failure) for s in settings]
        is_out = failure is not None or _breaks_fidelity(unmeasured[0], limits)
        measured += unmeasured if is_out else _with_speed(path, unmeasured, judges, stages)
        stages.done("speed")
    choice = choose(measured, limits)
    if choice.winner is None:
        measured = _measure_the_rest(measured, judged, judges, stages)
        choice = choose(measured, limits)
    return measured, choice


def _judge(
    source: Path, work: Path, judges: Judges, format_: Format, stages: _Stages
) -> tuple[Path, Fidelity | None, str | None]:
    """Write one format and measure its fidelity: (checkpoint, fidelity, None) or (path, None, why it failed)."""
    path = source
    try:
        if format_.recipe is None:
            return path, REFERENCE_FIDELITY, None
        path = work / format_.folder
        stages.begin("compress")
        judges.compress(path, format_.recipe)
        stages.begin("evaluate")
        fidelity = judges.fidelity(path)
        if not math.isfinite(fidelity.worst_kl):
            return path, None, "its KL is not a number: the format broke the model"
        return path, fidelity, None
    except PowertrainError as error:
        return path, None, str(error)
    finally:
        stages.done("compress")
        stages.done("evaluate")


def _breaks_fidelity(candidate: Measured, limits: Limits) -> bool:
    """Only the KL limit can be broken while there is no speed."""
    has_kl = candidate.fidelity is not None
    return has_kl and "max_kl" in broken_limits(candidate, limits)


def _with_speed(path: Path, candidates: Sequence[Measured], judges: Judges, stages: _Stages) -> list[Measured]:
    stages.begin("speed")
    try:
        speeds = judges.speed(path, [candidate.setting for candidate in candidates])
    except PowertrainError as error:
        return [replace(candidate, failure=str(error)) for candidate in candidates]
    return [replace(candidate, speed=speed) for candidate, speed in zip(candidates, speeds, strict=True)]


def _measure_the_rest(
    measured: Sequence[Measured],
    judged: Sequence[tuple[Format, Path, Fidelity | None, str | None]],
    judges: Judges,
    stages: _Stages,
) -> list[Measured]:
    result: list[Measured] = []
    for format_, path, _, failure in judged:
        own = [candidate for candidate in measured if candidate.format == format_]
        is_missing = failure is None and all(c.speed is None and c.failure is None for c in own)
        result += _with_speed(path, own, judges, stages) if is_missing else own
    return result


class _Stages:
    """Progress of each stage over all formats."""

    def __init__(self, progress: Progress, num_formats: int) -> None:
        self._progress = progress
        self._total = num_formats
        self._counts: dict[str, int] = {}

    def begin(self, stage: str) -> None:
        self._progress(stage, self._counts.get(stage, 0), self._total)

    def done(self, stage: str) -> None:
        self._counts[stage] = min(self._total, self._counts.get(stage, 0) + 1)
        self.begin(stage)


@contextlib.contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """OUT/.work, empty at first and gone at the end, however the end comes.

    Raises `PowertrainError` if `out` is a file, cannot be written, or holds a `model` that is not ours to replace.
    """
    _check_output(out)
    work = out / ".work"
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except OSError as error:
        raise PowertrainError(f"cannot write {out}: {error.strerror}; choose another output folder") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_output(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise PowertrainError(f"{out} is a file; give a folder for the result")
    if (out / "model").exists() and not (out / "record.json").exists():
        raise PowertrainError(f"{out / 'model'} is not a result of optimize; give a new or empty folder")


def install_winner(choice: Choice, source: Path, work: Path, out: Path) -> Path | None:
    """Put the winner at OUT/model by a rename; an earlier one is replaced. Returns what to serve, None without winner.

    For the model as it is nothing is copied: OUT/model is absent and the source itself is served.
    """
    target = out / "model"
    if target.exists() or target.is_symlink():
        target.rename(work / "previous")
    if choice.winner is None:
        return None
    if choice.winner.format.recipe is None:
        return source
    (work / choice.winner.format.folder).rename(target)
    return target
