"""How much of what removing a third of a model's layers costs comes back in 18 minutes of distillation on one GPU.

Layers go by block influence (or greedily by KL); the rest is trained to give the whole model's distributions on text
that is not the judge's. The judge is KL on held-out text in float32, of the folder as it is read back. Stops after
--max-seconds with its state in --work: the same command goes on from there, and the last one writes the record. Exits 1
where a bar is missed. docs/distillation.md says how to read it. Needs torch, numpy, safetensors and tokenizers only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import parser, write
from safetensors.torch import load_file, save_file
from torch.nn import functional

from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.compress.plain_model import load_plain_model, run_block
from powertrain.compress.prune_depth import block_influence, depth_pruned, greedy_kept, most_influential
from powertrain.distill.batches import Batch, WindowBatches, split_off, tokens_sha256
from powertrain.distill.losses import Divergence, token_loss
from powertrain.distill.run import distillation_manifest, num_shared_ngrams, training_runs, write_student
from powertrain.distill.student import Student, dense_student
from powertrain.distill.teachers import LiveTeacher
from powertrain.distill.trainer import Compute, TrainConfig, Trainer, hidden_pairs
from powertrain.measure import record
from powertrain.measure.scoring import targets
from powertrain.measure.statistics import TokenScores, compare_logits, summarize
from powertrain.text_data import Window, encode_texts, read_texts, spread, token_sha256, windows_of
from powertrain.types import PowertrainError

STARTED = time.perf_counter()

MIN_SHARE, MAX_SECONDS = 0.75, 18 * 60
"""The bars: of the KL that pruning adds, so much is gone after so many seconds, all commands together."""

CALIBRATION_WINDOWS = 64
GREEDY_WINDOWS = 16
WATCHED_SHARE = 0.01
"""Of each training file, from its end: watched while training, never trained on."""

SAVING_SECONDS = 15.0
"""Left of --max-seconds for the state to be written."""

PLAN_FILE, TOKENS_FILE = "plan.json", "tokens.safetensors"
SHOWN = ("kl_mean", "kl_p50", "kl_p99", "top1_agreement", "ppl_reference", "ppl_candidate")
Row = dict[str, Any]


def main() -> None:
    given = _arguments()
    torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("highest")  # no TF32 in what judges
    try:
        _heal(given)
    except PowertrainError as error:
        sys.exit(f"error: {error}")


def _heal(given: argparse.Namespace) -> None:
    source = open_checkpoint(resolve_model(given.model))
    tokens = _tokens(given, source)
    runs, watched = split_off(tokens, WATCHED_SHARE, given.length)
    plan = _plan(given, source, torch.cat(runs), tokens)
    trainer, student, batches = _trainer(given, source, plan, torch.cat(runs), watched)
    trainer.warm_up()
    _say(f"ready; training begins at step {trainer.history.step}")
    left = given.max_seconds - SAVING_SECONDS - (time.perf_counter() - STARTED)
    done = trainer.history.step
    history = trainer.run(max_seconds=max(0.0, left), save_every=given.max_seconds, progress=_progress())
    plan["commands"].append({"steps": history.step - done, "wall_seconds": time.perf_counter() - STARTED})
    trained = history.step * given.batch * given.length
    _say(f"{history.step} steps, {trained:,} tokens, {trained / max(history.seconds, 1e-9):,.0f} tokens/s")
    if history.ended is None:
        _write_plan(given, plan)
        _say("not over yet: run the same command again")
        return
    about = {"teacher": given.model, "layers_kept": plan["kept"], "data_sha256": batches.sha256}
    manifest = distillation_manifest(_config(given, plan), history, about)
    pruned = depth_pruned(source, plan["kept"])
    best = trainer.best_parameters()
    out = write_student(given.out, pruned, source.path, student, best, "auto", manifest, overwrite=True)
    del trainer, student, best
    after = _judge(given, source, open_checkpoint(out))
    plan["commands"][-1]["wall_seconds"] = time.perf_counter() - STARTED
    _report(given, plan, history, after, {"data_sha256": batches.sha256, "tokens": len(torch.cat(runs))})


def _report(given: argparse.Namespace, plan: Row, history: Any, after: Row, data: Row) -> None:
    share = 1 - after["kl_mean"] / plan["before"]["kl_mean"]
    wall = sum(command["wall_seconds"] for command in plan["commands"])
    trained = history.step * given.batch * given.length
    missed = []
    if share < MIN_SHARE:
        missed.append(f"share of the KL increase removed {share:.3f}, bar {MIN_SHARE}")
    if wall > MAX_SECONDS:
        missed.append(f"all commands took {wall:.0f} s, bar {MAX_SECONDS}")
    options = {name: value for name, value in vars(given).items() if name not in ("json", "git", "work", "out")}
    made = record.new_record(
        "heal",
        git=given.git,
        model=Path(given.model).name,
        config={name: _plain(value) for name, value in options.items()},
        data=data | plan["data"],
        kept=plan["kept"],
        influences=plan["influences"],
        before=plan["before"],
        after=after,
        share_of_kl_removed=share,
        bars={"share_of_kl_removed": {"min": MIN_SHARE}, "wall_seconds": {"max": MAX_SECONDS}},
        missed=missed,
        wall_seconds=wall,
        commands=plan["commands"],
        training={
            "steps": history.step,
            "tokens": trained,
            "epochs": trained / data["tokens"],
            "seconds": history.seconds,
            "tokens_per_s": trained / max(history.seconds, 1e-9),
            "best_step": history.best_step,
            "ended": history.ended,
        },
        curve=history.curve,
    )
    write(given.json, made)
    print(f"KL {plan['before']['kl_mean']:.4f} -> {after['kl_mean']:.4f}: {share:.1%} of it removed in {wall:.0f} s")
    print("\n".join(f"MISSED {sentence}" for sentence in missed) or "every bar is met")
    sys.exit(1 if missed else 0)


def _arguments() -> argparse.Namespace:
    add = (made := parser(__doc__, "heal.json")).add_argument
    add("--model", default="smollm2", help="a model's name, folder or GGUF file")
    add("--data", type=Path, nargs="+", required=True, help="training text: .txt or .jsonl, maybe .gz")
    add("--held-out", type=Path, required=True, help="the judge's text, of none of the training files")
    add("--work", type=Path, required=True, help="folder of the state between commands")
    add("--out", type=Path, required=True, help="folder for the healed model")
    add("--keep", type=int, default=20, help="layers that stay")
    add("--choose", default="influence", choices=("influence", "greedy"), help="how those that go are chosen")
    add("--seconds", type=float, default=930.0, help="of training, all commands together: the schedule's length")
    add("--steps", type=int, help="end after so many steps instead")
    add("--max-seconds", type=float, default=550.0, help="of this command, from its start")
    add("--learning-rate", type=float, default=6e-4)
    add("--weight-decay", type=float, default=0.01)
    add("--loss", default="forward-kl", choices=("forward-kl", "reverse-kl", "jsd"))
    add("--temperature", type=float, default=1.0)
    add("--hidden-weight", type=float, default=0.0, help="of the streams' loss, over all layers")
    add("--batch", type=int, default=64, help="windows of a step")
    add("--length", type=int, default=512, help="tokens of a window, in training and for the judge")
    add("--positions", type=int, default=8192, help="whose logits exist at a time")
    add("--evaluate-every", type=int, default=250, help="steps between looks at the watched text")
    add("--judge-tokens", type=int, default=65536)
    add("--compile", action="store_true", help="compile blocks and loss with torch.compile")
    add("--recompute", action="store_true", help="run blocks again in the backward pass: less memory")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: only to see that all runs")
    add("--threads", type=int, default=8)
    add("--seed", type=int, default=0)
    given = made.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; --device cpu shows that it runs")
    return given


def _tokens(given: argparse.Namespace, source: Checkpoint) -> list[torch.Tensor]:
    """The training files' ids, int32, made once."""
    file = given.work / TOKENS_FILE
    if file.is_file():
        stored = load_file(file)
        return [stored[str(at)] for at in range(len(stored))]
    runs = training_runs(given.data, load_tokenizer(source.path))
    given.work.mkdir(parents=True, exist_ok=True)
    save_file({str(at): run for at, run in enumerate(runs)}, file)
    _say(f"{sum(map(len, runs)):,} training tokens")
    return runs


# ---- what is removed ----


def _plan(given: argparse.Namespace, source: Checkpoint, tokens: torch.Tensor, runs: Sequence[torch.Tensor]) -> Row:
    """Which layers stay, what their removal costs, and what all commands did: made by the first, kept in --work."""
    file = given.work / PLAN_FILE
    if file.is_file():
        plan: Row = json.loads(file.read_text())
        if plan["asked"] != [given.keep, given.choose]:
            raise PowertrainError(f"{file} is of a run with other layers: give it another --work")
        return plan
    drawn = WindowBatches(tokens, length=given.length, batch_size=CALIBRATION_WINDOWS, seed=given.seed)
    samples = drawn.at(0).token_ids
    influences = block_influence(source, samples, given.device)
    if given.choose == "influence":
        kept = most_influential(influences, given.keep)
    else:
        model = load_plain_model(source, given.device, _dtype(given))
        kept, _ = greedy_kept(model, samples[:GREEDY_WINDOWS].to(given.device), given.keep)
    _say(f"layers that stay: {kept}")
    shared = num_shared_ngrams(runs, torch.tensor([window.token_ids for window in _windows(given, source)]))
    about = {"files": [path.name for path in given.data], "held_out": given.held_out.name}
    about |= {"training_13grams_in_held_out_text": shared}
    before = _judge(given, source, depth_pruned(source, kept))
    plan = {"asked": [given.keep, given.choose], "kept": kept, "influences": influences, "before": before}
    plan |= {"data": about, "commands": []}
    _write_plan(given, plan)
    return plan


def _write_plan(given: argparse.Namespace, plan: Row) -> None:
    record.write_text_atomically(given.work / PLAN_FILE, json.dumps(plan, indent=1) + "\n")


# ---- training ----


def _config(given: argparse.Namespace, plan: Row) -> TrainConfig:
    num_layers = len(plan["influences"])
    pairs = hidden_pairs(tuple(plan["kept"]), num_layers) if given.hidden_weight else ()
    return TrainConfig(
        steps=given.steps,
        seconds=None if given.steps else given.seconds,
        learning_rate=given.learning_rate,
        weight_decay=given.weight_decay,
        divergence=Divergence(given.loss, given.temperature),
        hidden_weight=given.hidden_weight,
        hidden_pairs=pairs,
        evaluate_every=given.evaluate_every,
    )


def _trainer(
    given: argparse.Namespace, source: Checkpoint, plan: Row, tokens: torch.Tensor, watched: torch.Tensor
) -> tuple[Trainer, Student, WindowBatches]:
    run, loss = run_block, token_loss
    if given.compile:
        run, loss = torch.compile(run_block, dynamic=False), torch.compile(token_loss, dynamic=False)
    compute = Compute(
        device=given.device,
        dtype=_dtype(given),
        recomputes=given.recompute,
        positions_at_once=given.positions,
        run=run,
    )
    pruned = depth_pruned(source, plan["kept"])
    frozen = load_plain_model(source, given.device, compute.dtype)
    teacher = LiveTeacher(frozen, run=run, loss=loss)
    student = dense_student(pruned, given.device)
    batches = WindowBatches(tokens, length=given.length, batch_size=given.batch, seed=given.seed)
    identity = {"kept": plan["kept"], "watched": tokens_sha256(watched)}
    state = given.work / "state"
    config = _config(given, plan)
    trainer = Trainer(
        teacher, student, batches, Batch(watched), config, compute=compute, folder=state, identity=identity
    )
    return trainer, student, batches


def _dtype(given: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if given.device == "cuda" else torch.float32


# ---- the judge ----


def _windows(given: argparse.Namespace, source: Checkpoint) -> list[Window]:
    token_ids = encode_texts(read_texts(given.held_out), load_tokenizer(source.path))
    return spread(windows_of(token_ids, given.length), given.judge_tokens)


@torch.inference_mode()
def _judge(given: argparse.Namespace, source: Checkpoint, candidate: Checkpoint) -> Row:
    """KL and company of `candidate` against the whole model, both in float32, with intervals over windows."""
    begun = time.perf_counter()
    windows = _windows(given, source)
    models = [load_plain_model(one, given.device, torch.float32) for one in (source, candidate)]
    scores: list[TokenScores] = []
    for window in windows:
        token_ids = torch.tensor([window.token_ids[:-1]], device=given.device)
        reference, other = (functional.linear(model.hidden(token_ids)[0], model.head) for model in models)
        scores.append(compare_logits(reference, other, targets(window)))
    found = summarize(scores)
    row: Row = {name: found.values[name] for name in SHOWN}
    row["intervals"] = {name: list(found.intervals[name]) for name in SHOWN if name in found.intervals}
    row |= {"num_tokens": sum(map(len, scores)), "tokens_sha256": token_sha256(windows)}
    _say(f"KL {row['kl_mean']:.4f}, perplexity {row['ppl_reference']:.2f} -> {row['ppl_candidate']:.2f}")
    return row | {"seconds": time.perf_counter() - begun}


# ---- words ----


def _progress() -> Any:
    last = [0.0]

    def show(what: str, done: float, total: float | None) -> None:
        if time.perf_counter() - last[0] > 30:
            last[0] = time.perf_counter()
            _say(f"{what} {done / (total or 1.0):.1%}")

    return show


def _say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Path) else value


if __name__ == "__main__":
    main()
