"""All judges of one candidate in one run: both models are read once, and every verdict lands in one record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powertrain.measure import agreement as greedy
from powertrain.measure.acceptance import Acceptance
from powertrain.measure.acceptance import acceptance as accept
from powertrain.measure.evaluate import DEFAULT_NUM_TOKENS, DEFAULT_WINDOW, Evaluation, Reference
from powertrain.measure.gates import Gate, Verdict, check_gates_can_be_held, hold
from powertrain.measure.overlap import Overlap, find_overlap, refuse_overlaps, scored_parts, task_parts
from powertrain.measure.per_layer import LayerDistances, check_layers_correspond, compare_layers
from powertrain.measure.scoring import SELF, Data, Progress, data_name, read_model
from powertrain.measure.task_data import read_tasks
from powertrain.measure.tasks import Score, TaskEvaluation, TaskResult, evaluate_tasks
from powertrain.types import PowertrainError

NONE = "none"
"""As `data`: no text is scored, only tasks or greedy text."""

_SHOWN = ("kl_mean", "kl_p50", "kl_p99", "top1_agreement", "ppl_reference", "ppl_candidate", "ppl_ratio")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What was asked for; the rest is None. `verdicts` are of the gates.

    `overlaps`: calibration text that was scored, since that was allowed.
    """

    evaluation: Evaluation | None
    tasks: TaskEvaluation | None
    agreement: greedy.Agreement | None
    acceptance: Acceptance | None
    verdicts: Sequence[Verdict]
    overlaps: Sequence[Overlap] = ()
    layers: LayerDistances | None = None

    @property
    def is_passed(self) -> bool:
        return all(verdict.is_met for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, schema 1: the evaluation's own record, or one of kind `tasks`; the parts asked for beside it."""
        record = {"schema": 1, "kind": "tasks"} if self.evaluation is None else self.evaluation.to_dict()
        if self.layers is not None:
            record["per_layer"] = self.layers.to_dict()
        if self.tasks is not None:
            whole = self.tasks.to_dict()
            record["tasks"] = whole["tasks"]
            record["tasks_run"] = {name: whole[name] for name in ("settings", "num_resumed", "seconds")}
        if self.agreement is not None:
            record["agreement"] = self.agreement.to_dict()
        if self.acceptance is not None:
            record["acceptance"] = self.acceptance.to_dict()
        if self.overlaps:
            record["overlaps"] = [overlap.to_dict() for overlap in self.overlaps]
        if self.verdicts:
            record["gates"] = [verdict.to_dict() for verdict in self.verdicts]
        return record

    def manifest_entries(self) -> dict[str, Any]:
        """What a compressed folder keeps of it: all but the single items and gates."""
        entries: dict[str, Any] = {}
        if self.evaluation is not None:
            entries["evaluation"] = self.evaluation.to_dict()
        if self.layers is not None:
            entries["per_layer"] = self.layers.to_dict()
        if self.tasks is not None:
            results = (task.to_dict() for task in self.tasks.tasks)
            entries["tasks"] = [{key: value for key, value in row.items() if key != "items"} for row in results]
        if self.agreement is not None:
            entries["agreement"] = self.agreement.to_dict()
        if self.acceptance is not None:
            entries["acceptance"] = self.acceptance.to_dict()
        return entries

    def text(self) -> str:
        """Tables for a terminal."""
        parts = [] if self.evaluation is None else [evaluation_text(self.evaluation)]
        parts += [] if self.layers is None else [self.layers.text()]
        parts += [] if self.tasks is None else [tasks_text(self.tasks.tasks)]
        parts += [] if self.agreement is None else [agreement_text(self.agreement)]
        parts += [] if self.acceptance is None else [acceptance_text(self.acceptance)]
        return "\n\n".join(parts)


def judge(
    candidate: str | Path,
    reference: str | Path,
    *,
    data: Data = SELF,
    num_tokens: int | None = DEFAULT_NUM_TOKENS,
    window: int = DEFAULT_WINDOW,
    chunk: int | None = None,
    per_layer: bool = False,
    tasks: Sequence[str | Path] = (),
    limit: int | None = None,
    separator: str | None = None,
    journal: str | Path | None = None,
    agreement: str | Path | None = None,
    acceptance: str | Path | None = None,
    num_prompts: int = greedy.DEFAULT_PROMPTS,
    gates: Sequence[Gate] = (),
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    kv_cache_dtype: str = "auto",
    seed: int = 0,
    allows_overlap: bool = False,
    progress: Progress | None = None,
) -> Judgement:
    """Compare on text as `evaluate` (unless `data` is "none"), there `per_layer` too as `compare_layers`, on tasks as
    `evaluate_tasks`, on greedy text after the prompts in the files `agreement` and `acceptance`; hold the gates.
    Raises what these raise, and `PowertrainError` for a gate on what is not measured, or for text or items that share
    runs of 13 tokens with a model's calibration, unless `allows_overlap`.
    """
    has_data = str(data) != NONE
    if not has_data and not tasks and agreement is None and acceptance is None:
        raise PowertrainError("--data none leaves nothing to compare: give a --task, --agreement or --acceptance")
    if per_layer and not has_data:
        raise PowertrainError("--per-layer needs --data other than none")
    check_gates_can_be_held(gates, has_data=has_data, has_tasks=bool(tasks))
    theirs = read_model(reference, device=device, dtype="float32")
    ours = read_model(candidate, device=device, dtype=dtype, kernels=kernels, kv_cache_dtype=kv_cache_dtype)
    if per_layer:
        check_layers_correspond(ours, theirs)
    evaluation = answered = written = accepted = layers = None
    models, overlaps = (ours, theirs), []
    for task in read_tasks(tasks):
        overlaps += find_overlap(task.name, task_parts(task.first_by_hash(limit), theirs, separator), models)
    refuse_overlaps(overlaps, allows_overlap)
    if has_data:
        against = Reference(theirs, data=data, num_tokens=num_tokens, window=window, seed=seed, progress=progress)
        overlaps += find_overlap(data_name(data), scored_parts(against.windows), models)
        refuse_overlaps(overlaps, allows_overlap)
        evaluation = against.compare(ours, chunk=chunk, progress=progress)
        layers = compare_layers(ours, theirs, against.windows, progress=progress) if per_layer else None
    if tasks:
        answered = evaluate_tasks(
            ours, theirs, tasks, limit=limit, separator=separator, journal=journal, seed=seed, progress=progress
        )
    if agreement is not None:
        written = greedy.agreement(ours, theirs, agreement, num_prompts=num_prompts, progress=progress)
    if acceptance is not None:
        accepted = accept(ours, theirs, acceptance, num_prompts=num_prompts, seed=seed, progress=progress)
    return Judgement(
        evaluation=evaluation,
        tasks=answered,
        agreement=written,
        acceptance=accepted,
        verdicts=hold(gates, evaluation, () if answered is None else answered.tasks),
        overlaps=overlaps,
        layers=layers,
    )


def evaluation_text(found: Evaluation) -> str:
    """The statistics with their intervals, a line each."""
    lines = []
    for name in _SHOWN:
        low, high = found.intervals.get(name, (None, None))
        interval = f"   [{low:.5g}, {high:.5g}]" if low is not None and high is not None else ""
        lines.append(f"{name:<16} {getattr(found, name):>10.5g}{interval}")
    lines += [f"{'bits_per_weight':<16} {found.bits_per_weight:>10.2f}", f"{'bytes':<16} {found.bytes:>10,}"]
    return "\n".join(lines)


def tasks_text(tasks: Sequence[TaskResult]) -> str:
    """Accuracies with standard errors, their difference with its interval and flips, in percent, a line per score."""
    head = ("task", "score", "items", "reference", "candidate", "difference", "flips")
    rows = [head, *(_cells(task, name, score) for task in tasks for name, score in task.scores.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    lines += [f"{task.name}: context of {task.num_cut} items cut on the left" for task in tasks if task.num_cut]
    return "\n".join(lines)


def _cells(task: TaskResult, name: str, score: Score) -> tuple[str, ...]:
    difference = f"{100 * score.difference:+.1f}"
    if score.difference_interval is not None:
        low, high = score.difference_interval
        difference += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return (
        task.name,
        name,
        str(task.num_items),
        f"{100 * score.reference:.1f} ±{100 * score.reference_stderr:.1f}",
        f"{100 * score.candidate:.1f} ±{100 * score.candidate_stderr:.1f}",
        difference,
        f"{100 * score.flips:.1f}",
    )


def agreement_text(found: greedy.Agreement) -> str:
    """One line."""
    return (
        f"greedy text agrees for {found.median:g} tokens (median; quartiles {found.p25:g} and {found.p75:g}), "
        f"{100 * found.identical:.0f} % of {found.num_prompts} prompts to the end of at most {found.max_tokens}"
    )


def acceptance_text(found: Acceptance) -> str:
    """What drafts of the candidate are worth, in two lines."""
    low, high = found.intervals.get("alpha", (None, None))
    interval = f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None and high is not None else ""
    per_step = "   ".join(f"{k}: {value:.2f}" for k, value in found.tokens_per_step.items())
    return (
        f"as a draft: {100 * found.alpha:.1f} %{interval} of {found.num_tokens:,} greedy tokens accepted, "
        f"{found.length:.2f} in a row\ntokens per step by number of drafts   {per_step}"
    )
