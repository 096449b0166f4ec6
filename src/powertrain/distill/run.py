"""Distillation from files to a folder: two models and text in, a healed student out, by as many commands as wanted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch

from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.checkpoint.tokenizer_files import hugging_face_files, load_tokenizer
from powertrain.compress.calibrate import NgramFilter
from powertrain.compress.manifest import MANIFEST_FILE, manifest_text, weights_sha256
from powertrain.compress.plain_model import load_plain_model
from powertrain.distill.batches import Batch, Batches, WindowBatches, split_off, tokens_sha256
from powertrain.distill.on_policy import OnPolicy
from powertrain.distill.parallel import sharded_teacher
from powertrain.distill.quantized_student import Trains, quantized_student
from powertrain.distill.state import History
from powertrain.distill.student import Student, dense_student
from powertrain.distill.teacher_logits import store_teacher_logits
from powertrain.distill.teachers import LiveTeacher, Teacher
from powertrain.distill.trainer import Compute, Progress, TrainConfig, Trainer
from powertrain.model.families import model_config
from powertrain.text_data import encode_texts, read_texts
from powertrain.tokenizer import Tokenizer
from powertrain.types import PowertrainError

HELD_OUT_SHARE = 0.02
"""Of each training file, from its end, where no held-out text is given."""

DOCUMENT_MARK = "<doc "
"""Lines that begin so stand between the articles of a Wikipedia extract; they are not text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """How the text is cut: windows of `length` tokens, `batch_size` of them a step, in an order drawn by `seed`.

    `held_out_windows`: at most so many are scored at each evaluation, spread over the held-out text.
    """

    length: int = 512
    batch_size: int = 8
    seed: int = 0
    held_out_windows: int = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillReport:
    """What a run did so far. `out` holds the student once `history.ended` says why it is over."""

    out: Path
    history: History
    manifest: dict[str, Any]

    def summary(self) -> str:
        """A line or two for people."""
        history = self.history
        kls = [row["held_out_kl"] for row in history.curve if "held_out_kl" in row]
        lines = [f"{history.step} steps in {history.seconds:.0f} s"]
        if kls:
            lines[0] += f"; held-out KL {kls[0]:.4f} at the start, best {history.best_kl:.4f} after {history.best_step}"
        lines.append(
            f"wrote {self.out}" if history.ended else "not over yet: run the same command again to go on from here"
        )
        return "\n".join(lines)


def distill(
    teacher: str | Path,
    student: str | Path,
    out: str | Path,
    *,
    data: Sequence[str | Path],
    config: TrainConfig,
    held_out: str | Path | None = None,
    text: TextConfig | None = None,
    compute: Compute | None = None,
    dtype: str = "auto",
    max_seconds: float | None = None,
    trains: Trains = "scales",
    top_k: int | None = None,
    on_policy: OnPolicy | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DistillReport:
    """Train the model `student` to give `teacher`'s distributions on the text files `data`, and write it to `out`.

    Stops after `max_seconds` with its state in the folder `OUT.training` beside `out`; the same call goes on from it,
    and a finished run leaves only `out`: weights (in `dtype`; auto is bfloat16), config, tokenizer, and a manifest with
    data hashes, settings and the loss curve. A student of integers (compressed-tensors) stays one: its scales are
    trained, and with `trains` "weights" its integers and norms too. `top_k`: the teacher runs once, so many of its
    log-probabilities of each position are stored in `OUT.training`, and learned from. `held_out`: text whose KL is
    watched (the ends of `data` if None). `on_policy`: a share of the steps trains on what the student writes. Where
    `compute.processes` are several, all of them call this, on one file system, and the first one writes. Raises
    `PowertrainError` for models of different vocabularies, too little text, on-policy steps under several processes,
    or a state of another run.
    """
    out, text, compute = Path(out).absolute(), text or TextConfig(), compute or Compute()
    work = out.with_name(f"{out.name}.training")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise PowertrainError(f"{out} already holds something: choose another output folder or allow overwriting it")
    source, pupil = open_checkpoint(resolve_model(teacher)), open_checkpoint(resolve_model(student))
    check_pair(source, pupil)
    longest = min(model_config(one.config).max_position for one in (source, pupil))
    if not 2 <= text.length <= longest:
        raise PowertrainError(f"windows must have 2 to {longest} tokens for these models, got {text.length}")
    if on_policy is not None:
        _check_on_policy(on_policy, text, top_k, compute)
    runs = training_runs(data, load_tokenizer(source.path), progress)
    windows, shared = _held_out(runs, held_out, source, text)
    trained = _student(pupil, source, trains, compute)
    batches = WindowBatches(
        torch.cat(runs), length=text.length, batch_size=text.batch_size, seed=text.seed, moves_cuts=top_k is None
    )
    identity = {
        "teacher": weights_sha256(source.path),
        "student": weights_sha256(pupil.path),
        "held_out": tokens_sha256(windows),
    }
    stored: dict[str, Any] = {"top_k": top_k, "folder": work / "teacher-logits", "sha256": identity["teacher"]}
    teaching, watched = _teaching(source, compute, batches, windows, **stored, progress=progress)
    where = {**identity, "trains": trains, "top_k": top_k}
    seen: Batches = batches
    if on_policy is not None:
        seen = on_policy.batches(batches, trained, pupil.config, compute.device, compute.dtype, seed=text.seed)
    trainer = Trainer(teaching, trained, seen, watched, config, compute=compute, folder=work, identity=where)
    pause_every = 1 if on_policy is None else on_policy.refresh_every
    history = trainer.run(max_seconds=max_seconds, pause_every=pause_every, progress=progress)
    about: dict[str, Any] = {"teacher": str(teacher), "student": str(student), "text": asdict(text)}
    about |= {"data": [Path(file).name for file in data], "data_sha256": batches.sha256}
    about |= {"num_training_tokens": sum(map(len, runs))}
    about |= {"trains": trains, "top_k": top_k, "sha256": identity, "training_13grams_in_held_out_text": shared}
    about["on_policy"] = None if on_policy is None else on_policy.to_dict()
    manifest = distillation_manifest(config, history, about)
    best = trainer.best_parameters() if history.ended is not None else None
    if best is not None and compute.processes.is_first:
        write_student(out, pupil, source.path, trained, best, dtype, manifest, overwrite=overwrite)
        shutil.rmtree(work, ignore_errors=True)
    return DistillReport(out=out, history=history, manifest=manifest)


def _student(pupil: Checkpoint, source: Checkpoint, trains: Trains, compute: Compute) -> Student:
    """What is trained of a student's checkpoint."""
    if "quantization_config" in pupil.config:
        return quantized_student(pupil, trains, teacher=source, device=compute.device)
    if compute.processes.size > 1:  # which read the same pages of the file, each for its part
        return dense_student(pupil, "cpu", None)
    return dense_student(pupil, compute.device)


def _teaching(
    source: Checkpoint,
    compute: Compute,
    batches: WindowBatches,
    held_out: torch.Tensor,
    *,
    top_k: int | None,
    folder: Path,
    sha256: str,
    progress: Progress | None,
) -> tuple[Teacher, Batch]:
    """The teacher in memory, or its stored view of all windows; and the held-out ones, which stand last there."""
    processes, device, dtype = compute.processes, compute.device, compute.dtype
    if top_k is None:
        if processes.size == 1:
            return LiveTeacher(load_plain_model(source, device, dtype)), Batch(held_out)
        frozen = load_plain_model(source, "cpu", None)
        return LiveTeacher(sharded_teacher(frozen, processes, device, dtype)), Batch(held_out)
    every, part = torch.cat((batches.windows(), held_out)), (processes.rank, processes.size)
    frozen = load_plain_model(source, device, dtype)
    stored = store_teacher_logits(frozen, every, folder, k=top_k, teacher_sha256=sha256, part=part, progress=progress)
    processes.meet()  # each reads what all have stored
    return stored, Batch(held_out, keys=tuple(range(batches.num_windows, len(every))))


def _check_on_policy(on_policy: OnPolicy, text: TextConfig, top_k: int | None, compute: Compute) -> None:
    if top_k is not None:
        raise PowertrainError("on-policy: stored teacher logits (top_k) are of given text; leave one of the two out")
    if compute.processes.size > 1:
        raise PowertrainError("on-policy: the sampler wants the whole student in one process; leave --on-policy out")
    if on_policy.num_prompt_tokens >= text.length:
        raise PowertrainError(
            f"on-policy: prompts of {on_policy.num_prompt_tokens} tokens leave nothing of windows of {text.length}"
        )


def check_pair(teacher: Checkpoint, student: Checkpoint) -> None:
    """Raises `PowertrainError` where the two models do not share a vocabulary, or the teacher is quantized."""
    if "quantization_config" in teacher.config:
        raise PowertrainError(f"the teacher {teacher.path} holds quantized weights: give the model they were made from")
    sizes = [int(checkpoint.config["vocab_size"]) for checkpoint in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise PowertrainError(f"teacher and student must share a vocabulary: theirs have {sizes[0]} and {sizes[1]} ids")


def training_runs(
    files: Sequence[str | Path], tokenizer: Tokenizer, progress: Progress | None = None
) -> list[torch.Tensor]:
    """The tokens of each file, int32 [tokens], its documents joined by the end-of-text token."""

    def encoded(file: str | Path) -> torch.Tensor:
        texts = [part for text in read_texts(file) for part in documents(text)]
        return torch.tensor(encode_texts(texts, tokenizer), dtype=torch.int32)

    runs = []
    with ThreadPoolExecutor() as pool:  # the tokenizer works outside of Python's lock
        for number, run in enumerate(pool.map(encoded, files), 1):
            runs.append(run)
            if progress is not None:
                progress("read text", number, len(files))
    return runs


def num_shared_ngrams(runs: Sequence[torch.Tensor], windows: torch.Tensor) -> int:
    """How many of the 13-grams of training text, int32 [tokens] each, the windows, int64 [n, length], hold too."""
    return NgramFilter(windows).num_shared([cast("Sequence[int]", run.numpy()) for run in runs])


def documents(text: str) -> list[str]:
    """A text cut at lines that mark the beginning of an article."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if line.startswith((DOCUMENT_MARK, "</doc>")):
            parts.append([])
        else:
            parts[-1].append(line)
    return [joined for part in parts if (joined := "".join(part)).strip()]


def _held_out(
    runs: list[torch.Tensor], file: str | Path | None, source: Checkpoint, text: TextConfig
) -> tuple[torch.Tensor, int]:
    """Windows to watch, int64 [n, length], and how many of the training text's 13-grams they hold.

    Without a file they are cut from the ends of `runs`, which are shortened in place.
    """
    if file is None:
        runs[:], windows = split_off(runs, HELD_OUT_SHARE, text.length)
    else:
        tokens = torch.tensor(encode_texts(read_texts(file), load_tokenizer(source.path)))
        windows = tokens[: len(tokens) // text.length * text.length].view(-1, text.length)
    if not len(windows):
        where = "its share of the training text" if file is None else str(file)
        problem = f"the held-out text ({where}) is shorter than one window of {text.length} tokens"
        raise PowertrainError(f"{problem}: give more text, or shorter windows")
    chosen = torch.linspace(0, len(windows) - 1, min(len(windows), text.held_out_windows)).round().long()
    return windows[chosen], num_shared_ngrams(runs, windows[chosen])


def distillation_manifest(config: TrainConfig, history: History, about: Mapping[str, Any]) -> dict[str, Any]:
    """What `powertrain.json` says of a distilled model: JSON-ready, schema 1."""
    from powertrain import __version__

    return {
        "schema": 1,
        "kind": "distillation",
        "written_by": "powertrain",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": {"powertrain": __version__, "torch": torch.__version__},
        **about,
        "config": asdict(config),
        "steps": history.step,
        "seconds": round(history.seconds, 3),
        "ended": history.ended,
        "best_step": history.best_step,
        "best_kl": history.best_kl,
        "curve": history.curve,
        "evaluation": None,
    }


def write_student(
    out: Path,
    source: Checkpoint,
    tokenizer_path: Path,
    student: Student,
    parameters: Mapping[str, torch.Tensor],
    dtype: str,
    manifest: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write what was trained as a folder with the config of `source` and the tokenizer of the model at another path."""
    stored = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    config = dict(source.config)
    if "quantization_config" not in config:  # there the type is of what the folder held already
        config = {key: value for key, value in config.items() if key != "dtype"}
        config["torch_dtype"] = str(stored).removeprefix("torch.")
    files: dict[str, bytes | str] = {**hugging_face_files(tokenizer_path), MANIFEST_FILE: manifest_text(manifest)}
    if source.generation_config:
        files["generation_config.json"] = json.dumps(source.generation_config, indent=2) + "\n"
    return write_checkpoint(out, config, student.stored(parameters, stored), files, overwrite=overwrite)
