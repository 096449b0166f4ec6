"""Two models on the same tasks: accuracy of both, its paired difference, and the answers that flipped.

Flips are the items that went from right to wrong or from wrong to right: where both are as many, accuracy stays and
the model has changed all the same. Dutta et al. 2024, "Accuracy is Not All You Need", arXiv 2407.09141.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powertrain import __version__
from powertrain.measure.scoring import Model, Progress, check_same_vocabulary, read_model
from powertrain.measure.statistics import summarize_items
from powertrain.measure.task_data import Item, Task, read_tasks
from powertrain.measure.task_journal import Journal
from powertrain.measure.task_scoring import Answer, answer, encode_item
from powertrain.tokenizer import Tokenizer
from powertrain.types import PowertrainError

ITEMS_AT_ONCE = {"cpu": 1, "cuda": 32}
"""Items scored in one go, and so lost by an interruption: a CPU is busy with one, a GPU is not."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One way of choosing among an item's candidates: `acc` the likeliest, `acc_norm` the likeliest per byte.

    Shares of the items: accuracies with their standard errors; `difference`, candidate minus reference; `flips`, items
    whose answer turned wrong (`lost`) or right (`gained`); `changed`, items with another answer, wrong ones included.
    Intervals are paired 95 % bootstrap intervals over items, None with one item.
    """

    reference: float
    reference_stderr: float
    candidate: float
    candidate_stderr: float
    difference: float
    difference_interval: Interval | None
    flips: float
    flips_interval: Interval | None
    lost: float
    gained: float
    changed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """A task's scores by name, and every item's candidates as both models saw them.

    `gold_logprob`: mean log-probability in nats of the right answers, `reference`, `candidate` and `difference` with
    its interval. `num_cut`: items whose context was cut on the left to fit the model.
    """

    name: str
    path: str
    sha256: str
    format: str
    num_items: int
    num_in_file: int
    num_cut: int
    scores: Mapping[str, Score]
    gold_logprob: Mapping[str, Any]
    items: Sequence[Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        scores = {name: asdict(score) for name, score in self.scores.items()}
        return {**values, "scores": scores, "gold_logprob": dict(self.gold_logprob), "items": list(self.items)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskEvaluation:
    """The results of all tasks, and what they hold for; `num_resumed` answers came from the journal."""

    tasks: Sequence[TaskResult]
    settings: Mapping[str, str]
    num_resumed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: schema 1, kind `tasks`."""
        results = [task.to_dict() for task in self.tasks]
        rest = {"num_resumed": self.num_resumed, "seconds": self.seconds}
        return {"schema": 1, "kind": "tasks", "tasks": results, "settings": dict(self.settings), **rest}


def evaluate_tasks(
    candidate: str | Path | Model,
    reference: str | Path | Model,
    tasks: Sequence[str | Path],
    *,
    limit: int | None = None,
    separator: str | None = None,
    journal: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    kernels: str = "auto",
    kv_cache_dtype: str = "auto",
    num_resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> TaskEvaluation:
    """Score the items of the files `tasks` with both models and compare their answers.

    `limit` takes that many items of each file, by hash. `separator` stands between query and answer (None: as
    `Item.texts` says). Answers are kept in the file `journal`, from which the same call goes on after an interruption;
    a larger `limit` goes on too. The reference runs in float32 on the reference kernels, the candidate as it would be
    served; both read the tokens of the reference's tokenizer. Raises `PowertrainError` for what cannot be read, another
    vocabulary, a journal of another run, or a model that gives no finite numbers.
    """
    from powertrain.checkpoint.tokenizer_files import load_tokenizer

    started = time.perf_counter()
    if limit is not None and limit < 1:
        raise PowertrainError(f"limit must be at least 1, got {limit}")
    read = read_tasks(tasks)
    if not isinstance(reference, Model):
        reference = read_model(reference, device=device, dtype="float32")
    if not isinstance(candidate, Model):
        candidate = read_model(candidate, device=device, dtype=dtype, kernels=kernels, kv_cache_dtype=kv_cache_dtype)
    check_same_vocabulary(candidate, reference)
    tokenizer = load_tokenizer(reference.path)
    max_length = min((model.max_length for model in (reference, candidate) if model.max_length), default=None)
    settings = _settings(candidate, reference, tokenizer, separator, max_length)
    hashes = {f"task {task.name}": task.sha256 for task in read}
    with Journal(None if journal is None else Path(journal), {**settings, **hashes}) as kept:
        scoring = _Scoring(tokenizer, max_length, separator, kept, progress)
        results = []
        for task in (task.first_by_hash(limit) for task in read):
            answers = {role: scoring.run(role, model, task) for role, model in _roles(reference, candidate)}
            results.append(_result(task, answers, scoring.num_cut, num_resamples, seed))
    names = {"reference": reference.name, "candidate": candidate.name}
    return TaskEvaluation(
        tasks=results,
        settings={**names, **settings},
        num_resumed=kept.num_read,
        seconds=round(time.perf_counter() - started, 3),
    )


def _roles(reference: Model, candidate: Model) -> tuple[tuple[str, Model], ...]:
    return ("reference", reference), ("candidate", candidate)


def _settings(
    candidate: Model, reference: Model, tokenizer: Tokenizer, separator: str | None, max_length: int | None
) -> dict[str, str]:
    """All that the answers depend on besides the tasks, as text: a journal goes on only where all of it is the same."""
    from powertrain.compress.manifest import weights_sha256

    found = {
        "powertrain": __version__,
        "tokenizer": hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest(),
        "separator": "auto" if separator is None else repr(separator),
        "longest context": str(max_length),
    }
    for role, model in _roles(reference, candidate):
        found[f"{role} weights"] = weights_sha256(model.path)
        for name in ("device", "dtype", "kernels", "kv_cache_dtype"):
            found[f"{role} {name}"] = str(getattr(model, name))
    return found


class _Scoring:
    """Asks one model after the other, unless the journal knows. `num_cut` is of the task that ran last."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int | None,
        separator: str | None,
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self._tokenizer, self._max_length, self._separator = tokenizer, max_length, separator
        self._journal, self._progress = journal, progress
        self.num_cut = 0

    def run(self, role: str, model: Model, task: Task) -> list[Answer]:
        """The answers to all items of `task`."""
        keys = [(role, task.name, item.sha256) for item in task.items]
        missing = [number for number, key in enumerate(keys) if self._journal.get(key) is None]
        questions = [self._encode(task, item) for item in task.items]
        self.num_cut = sum(question.is_cut for question in questions)
        at_once = ITEMS_AT_ONCE[model.decoder.device.type]
        for begin in range(0, len(missing), at_once):
            numbers = missing[begin : begin + at_once]
            try:
                found = answer(model.decoder, [questions[number] for number in numbers])
            except PowertrainError as error:
                line = task.items[numbers[0]].line
                raise PowertrainError(f"{model.name} at {task.path}:{line}: {error}") from error
            for number, one in zip(numbers, found, strict=True):
                self._journal.add(keys[number], one)
            if self._progress is not None:
                done = len(keys) - len(missing) + begin + len(numbers)
                self._progress(f"{task.name}, {role}", done, len(keys))
        return [self._known(task, item, key) for item, key in zip(task.items, keys, strict=True)]

    def _encode(self, task: Task, item: Item) -> Any:
        try:
            return encode_item(item, self._tokenizer, self._max_length, self._separator)
        except PowertrainError as error:
            raise PowertrainError(f"{task.path}:{item.line}: {error}") from error

    def _known(self, task: Task, item: Item, key: tuple[str, str, str]) -> Answer:
        found = self._journal.get(key)
        if found is None or len(found.logprobs) != len(item.answers):
            raise PowertrainError(f"the journal does not fit {task.path}:{item.line}: delete it")
        return found


def picks(task: Task, item: Item, given: Answer) -> dict[str, int]:
    """The chosen candidate by score name: the first of equal ones. -1: the model would have gone on otherwise."""
    if task.is_last_word:
        return {"acc": 0 if given.is_greedy[0] else -1}
    chosen = {"acc": int(np.argmax(given.logprobs))}
    if task.is_normalized:
        lengths = [len(text.encode()) for text in item.answers]
        chosen["acc_norm"] = int(np.argmax(np.array(given.logprobs) / lengths))
    return chosen


def _result(
    task: Task, answers: Mapping[str, Sequence[Answer]], num_cut: int, num_resamples: int, seed: int
) -> TaskResult:
    items = []
    for number, item in enumerate(task.items):
        entry: dict[str, Any] = {"line": item.line, "sha256": item.sha256, "gold": item.gold}
        for role, given in answers.items():
            entry[role] = {"logprobs": list(given[number].logprobs), "picks": picks(task, item, given[number])}
        items.append(entry)
    return TaskResult(
        name=task.name,
        path=str(task.path),
        sha256=task.sha256,
        format=task.format,
        num_items=len(items),
        num_in_file=task.num_in_file,
        num_cut=num_cut,
        scores={name: _score(items, name, num_resamples, seed) for name in items[0]["reference"]["picks"]},
        gold_logprob=_gold_logprob(items, num_resamples, seed),
        items=items,
    )


def _score(items: Sequence[Mapping[str, Any]], name: str, num_resamples: int, seed: int) -> Score:
    gold = np.array([item["gold"] for item in items])
    reference, candidate = (
        np.array([item[role]["picks"][name] for item in items]) for role in ("reference", "candidate")
    )
    before, after = (reference == gold).astype(float), (candidate == gold).astype(float)
    columns = {
        "reference": before,
        "candidate": after,
        "difference": after - before,
        "flips": np.abs(after - before),
        "lost": before * (1 - after),
        "gained": after * (1 - before),
        "changed": (reference != candidate).astype(float),
    }
    found = summarize_items(columns, num_resamples, seed)
    return Score(
        **found.values,
        reference_stderr=_stderr(found.values["reference"], len(items)),
        candidate_stderr=_stderr(found.values["candidate"], len(items)),
        difference_interval=found.intervals.get("difference"),
        flips_interval=found.intervals.get("flips"),
    )


def _stderr(share: float, count: int) -> float:
    """Of a share of `count` items, as the usual harness gives it."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else 0.0


def _gold_logprob(items: Sequence[Mapping[str, Any]], num_resamples: int, seed: int) -> dict[str, Any]:
    before, after = (
        np.array([item[role]["logprobs"][item["gold"]] for item in items]) for role in ("reference", "candidate")
    )
    columns = {"reference": before, "candidate": after, "difference": after - before}
    found = summarize_items(columns, num_resamples, seed)
    interval = found.intervals.get("difference")
    return {**found.values, "difference_interval": None if interval is None else list(interval)}
