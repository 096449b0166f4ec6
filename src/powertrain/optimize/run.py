"""`optimize`: from a model and limits to a chosen checkpoint, a record and a report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powertrain.measure import record
from powertrain.optimize.choice import Choice, Relaxation
from powertrain.optimize.search import Judges, Progress, install_winner, search, workspace
from powertrain.optimize.space import Fidelity, Limits, Measured, Setting, Speed, formats, parse_memory
from powertrain.optimize.space import serve_command as serve_line
from powertrain.optimize.space import settings as engine_settings
from powertrain.optimize.speed import SpeedWorkload, measure_speed
from powertrain.types import PowertrainError

if TYPE_CHECKING:
    from rich.table import Table

    from powertrain.measure.evaluate import Reference

# Few rows at a time: every format multiplies them as it stores them, as decoding does.
_SMALL_CHUNK = 8
# The KV pool is measured at a stated size, and served so under a memory limit: each request at this many tokens.
_POOL_TOKENS_PER_REQUEST = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured; the defaults keep a 135M-parameter model on 2 cores under four minutes.

    `num_tokens` of the data in windows of `window` for fidelity; `prompt` and `output` tokens a request for speed.
    """

    num_tokens: int = 1536
    window: int = 128
    prompt: int = 128
    output: int = 48
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeResult:
    """What came out. `model` is what to serve and `serve_command` how; both None when nothing meets the limits.

    `advice` then says which limit to relax to what. `record` is what `record_path` holds.
    """

    record: dict[str, Any]
    model: Path | None
    serve_command: str | None
    advice: tuple[str, ...]
    record_path: Path
    report_path: Path

    @property
    def is_qualified(self) -> bool:
        """Whether some candidate meets every limit."""
        return self.model is not None

    def table(self) -> Table:
        """All candidates with the reason against each, for a terminal (a rich renderable)."""
        from powertrain.optimize.report import terminal_table

        return terminal_table(self.record)

    def summary(self) -> str:
        """The outcome in a few lines: the winner and how to serve it, or what to relax."""
        if self.serve_command is not None:
            return f"best: {self.record['winner']}\nserve it: {self.serve_command}\nreport: {self.report_path}"
        lines = ["nothing meets the limits", *(f"  {line}" for line in self.advice)]
        return "\n".join([*lines, f"report: {self.report_path}"])


def optimize(
    model: str | Path,
    out: str | Path,
    *,
    tpot_ms: float | None = None,
    ttft_ms: float | None = None,
    max_kl: float | None = None,
    max_memory: int | str | None = None,
    batch: int = 1,
    data: str | Path = "self",
    effort: Effort | None = None,
    threads: int | None = None,
    device: str = "auto",
    git: str | None = None,
    progress: Progress | None = None,
) -> OptimizeResult:
    """Find the fastest way to run `model` on this machine within the limits, at `batch` concurrent requests.

    Limits: milliseconds per output token and to the first token, KL in nats per token from the model as it is, bytes of
    memory (`"600MB"`). Every weight format is written, read back and judged; survivors are timed in the real engine.
    `out` gets `model/` (absent if the model as it is wins), `record.json` and `report.html`. Raises `PowertrainError`
    for bad arguments or a model that cannot be run at all; limits that nothing meets are a result, not an error.
    """
    started = time.perf_counter()
    limits = Limits(tpot_ms=tpot_ms, ttft_ms=ttft_ms, max_kl=max_kl, max_memory=parse_memory(max_memory))
    if batch < 1:
        raise PowertrainError(f"--batch must be at least 1, got {batch}")
    effort = effort or Effort()
    report = progress or (lambda what, done, total: None)
    out = Path(out)
    source, config = _open(model, out)
    _set_threads(threads)
    notes: list[str] = []
    with workspace(out) as work:
        reference = _reference(source, data, effort, config, device, report)
        workload = _workload(reference, batch, effort, config)
        pool_bytes = workload.pool_bytes if limits.max_memory is not None else None
        settings = engine_settings(batch, threads, pool_bytes)
        judges = _judges(source, reference, workload, device, notes)
        measured, choice = search(source, work, judges, formats(config), settings, limits, report)
        served = install_winner(choice, source, work, out)
    shown = str(model) if served == source else str(served)
    command = serve_line(shown, choice.winner.setting.options) if choice.winner else None
    made = record.new_record(
        "optimize",
        git=git,
        model=str(model),
        limits=asdict(limits),
        batch=batch,
        config={
            "data": str(data),
            "effort": asdict(effort),
            "threads": threads,
            "small_chunk": _SMALL_CHUNK,
            "pool_bytes": workload.pool_bytes,
        },
        data_sha256=reference.data_sha256,
        results=[_row(candidate, choice) for candidate in measured],
        winner=choice.winner.name if choice.winner else None,
        serve=command,
        advice=[str(relaxation) for relaxation in choice.relaxations],
        notes=notes,
        seconds=round(time.perf_counter() - started, 1),
    )
    return _finish(made, out, served, choice.relaxations)


def _finish(made: dict[str, Any], out: Path, served: Path | None, relaxations: Sequence[Relaxation]) -> OptimizeResult:
    from powertrain.optimize.report import render_html

    record_path = record.write_record(out / "record.json", made)
    report_path = out / "report.html"
    record.write_text_atomically(report_path, render_html(made))
    return OptimizeResult(
        record=made,
        model=served,
        serve_command=made["serve"],
        advice=tuple(str(relaxation) for relaxation in relaxations),
        record_path=record_path,
        report_path=report_path,
    )


def _open(model: str | Path, out: Path) -> tuple[Path, dict[str, Any]]:
    from powertrain.checkpoint.hub import resolve_model
    from powertrain.checkpoint.source import open_checkpoint

    source = resolve_model(str(model))
    if source.resolve().is_relative_to((out / "model").resolve()):
        raise PowertrainError(f"{source} would be replaced by the result; give another output folder than {out}")
    return source, open_checkpoint(source).config


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _reference(
    source: Path, data: str | Path, effort: Effort, config: Mapping[str, Any], device: str, progress: Progress
) -> Reference:
    from powertrain.measure.evaluate import Reference

    progress("load and sample", 0, None)
    window = min(effort.window, int(config.get("max_position_embeddings") or effort.window))
    made = Reference(
        str(source),
        data=data,
        num_tokens=effort.num_tokens,
        window=window,
        device=device,
        seed=effort.seed,
        progress=lambda what, done, total: progress("load and sample", done, total),
    )
    progress("load and sample", 1, 1)
    return made


def _workload(reference: Reference, batch: int, effort: Effort, config: Mapping[str, Any]) -> SpeedWorkload:
    """Prompts cut from the evaluation text: drafts and sampling then meet text, not noise."""
    text = [token_id for window in reference.windows for token_id in window.token_ids]
    limit = int(config.get("max_position_embeddings") or 2**31)
    output = max(1, min(effort.output, limit // 2))
    prompt = max(1, min(effort.prompt, limit - output))
    prompts = tuple(
        tuple(text[(number * prompt + position) % len(text)] for position in range(prompt)) for number in range(batch)
    )
    pool_bytes = _pool_bytes(config, batch, max(_POOL_TOKENS_PER_REQUEST, prompt + output))
    return SpeedWorkload(prompts=prompts, output=output, pool_bytes=pool_bytes, seed=effort.seed)


def _pool_bytes(config: Mapping[str, Any], batch: int, num_tokens: int) -> int:
    from powertrain.model.families import model_config

    parsed = model_config(config)
    # 4 bytes: float32, the widest a cache entry gets.
    return batch * min(num_tokens, parsed.max_position) * parsed.kv_bytes_per_token(4)


def _judges(source: Path, reference: Reference, workload: SpeedWorkload, device: str, notes: list[str]) -> Judges:
    """The real judges; warnings about the source are collected in `notes`, each once."""

    def write(out: Path, recipe: Mapping[str, Any]) -> None:
        from powertrain.compress import compress

        for warning in compress(source, out, recipe).warnings:
            if warning not in notes:
                notes.append(warning)

    def fidelity(checkpoint: Path) -> Fidelity:
        from powertrain.compress.manifest import update_manifest
        from powertrain.measure.scoring import read_model

        candidate = read_model(checkpoint, device=device)
        whole = reference.compare(candidate)
        update_manifest(checkpoint, evaluation=whole.to_dict())
        small = reference.compare(candidate, chunk=_SMALL_CHUNK, num_resamples=1)
        low, high = whole.intervals.get("kl_mean", (whole.kl_mean, whole.kl_mean))
        return Fidelity(
            kl=whole.kl_mean,
            kl_low=low,
            kl_high=high,
            kl_small_batch=small.kl_mean,
            top1_agreement=whole.top1_agreement,
            ppl_ratio=whole.ppl_ratio,
            bits_per_weight=whole.bits_per_weight,
        )

    def speed(checkpoint: Path, settings: Sequence[Setting]) -> list[Speed]:
        return measure_speed(checkpoint, settings, workload, device)

    return Judges(write, fidelity, speed)


def _row(candidate: Measured, choice: Choice) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "format": candidate.format.name,
        "setting": candidate.setting.name,
        "options": dict(candidate.setting.options),
        "fidelity": asdict(candidate.fidelity) if candidate.fidelity else None,
        "speed": asdict(candidate.speed) if candidate.speed else None,
        "is_winner": candidate is choice.winner,
        "rejected": list(choice.rejections.get(candidate.name, ())),
    }
