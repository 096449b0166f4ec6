"""Two processes train what one does: losses, parameters, files; stopped, resumed by other numbers, or failing."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.multiprocessing import spawn
from typer.testing import CliRunner

import powertrain
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import Checkpoint, iterate, open_checkpoint
from powertrain.checkpoint.tokenizer_files import hugging_face_files
from powertrain.cli import app
from powertrain.compress import compress
from powertrain.compress.manifest import read_manifest
from powertrain.compress.plain_model import load_plain_model
from powertrain.compress.prune_depth import depth_pruned
from powertrain.distill import run as distill_run
from powertrain.distill.batches import Batch, WindowBatches
from powertrain.distill.parallel import ALONE, Processes, grouped, sharded_teacher
from powertrain.distill.quantized_student import Trains, quantized_student
from powertrain.distill.student import Student, dense_student
from powertrain.distill.teachers import LiveTeacher
from powertrain.distill.trainer import Compute, TrainConfig, Trainer, hidden_pairs
from powertrain.types import PowertrainError

# the processes import torch anew: ten seconds, but more where a machine has much else to do
pytestmark = pytest.mark.timeout(400)

TinyModel = Callable[[str], Path]
CONFIG = TrainConfig(steps=2, learning_rate=2e-3, warmup=0.2, evaluate_every=2)
LONGER = replace(CONFIG, steps=3)
HIDDEN = replace(CONFIG, hidden_weight=0.5, hidden_pairs=hidden_pairs((0, 1), 3))
FLAGS = ["--steps", "2", "--length", "32", "--batch-size", "3", "--evaluate-every", "2", "--device", "cpu"]
FLAGS += ["--dtype", "float32", "--top-k", "16"]


def tokens(num: int, seed: int) -> torch.Tensor:
    return torch.randint(5, 300, (num,), generator=torch.Generator().manual_seed(seed))


class Masked(WindowBatches):
    """Of whose windows unlike numbers of positions count, in the last ones none at all."""

    def at(self, step: int) -> Batch:
        token_ids = super().at(step).token_ids
        rows = torch.arange(len(token_ids)).unsqueeze(1)
        return Batch(token_ids, (torch.arange(token_ids.shape[1]) < 10 - 5 * rows).expand_as(token_ids))


def trainer(
    source: Checkpoint, student: Student, processes: Processes, config: TrainConfig = CONFIG, **own: Any
) -> Trainer:
    """Batches of 5 and 7 watched windows, which two processes cannot share evenly."""
    dtype = own.pop("dtype", torch.float32)
    teacher = load_plain_model(source, "cpu", dtype)
    if processes.size > 1:
        teacher = sharded_teacher(teacher, processes, "cpu", dtype)
    return Trainer(
        LiveTeacher(teacher),
        student,
        own.pop("kind", WindowBatches)(tokens(700, 0), length=24, batch_size=own.pop("batch_size", 5), seed=3),
        Batch(tokens(24 * 7, 1).view(-1, 24)),
        config,
        folder=own.pop("folder", None),
        identity=own.pop("identity", None),
        compute=Compute(positions_at_once=50, processes=processes, dtype=dtype, **own),
    )


def pruned(source: Checkpoint) -> Student:
    return dense_student(depth_pruned(source, [0, 1]))


def results(made: Trainer, **options: Any) -> dict[str, Any]:
    history = made.run(**options)
    best = made.best_parameters()
    return {"losses": history.losses, "curve": history.curve, "ended": history.ended, "best": best}


def runs(folder: Path, processes: Processes) -> dict[str, dict[str, Any]]:
    """What is trained by one process and by two, to be compared."""
    source, two_bits = open_checkpoint(folder / "teacher"), open_checkpoint(folder / "two_bits")
    found = {
        "dense": trainer(source, pruned(source), processes, LONGER),
        "hidden, one window": trainer(source, pruned(source), processes, HIDDEN, recomputes=True, batch_size=1),
        "masked": trainer(source, pruned(source), processes, kind=Masked),
        "bfloat16": trainer(source, pruned(source), processes, dtype=torch.bfloat16),
    }
    trains: Trains
    for trains in ("scales", "weights"):
        student = quantized_student(two_bits, trains, teacher=source)
        found[trains] = trainer(source, student, processes, recomputes=trains == "scales")
    stops = replace(CONFIG, steps=9, learning_rate=0.5, warmup=0.0, evaluate_every=1, patience=1)
    found["early stop"] = trainer(source, pruned(source), processes, stops)
    return {name: results(made) for name, made in found.items()}


def interrupt(made: Trainer, at: int) -> None:
    original = made._step

    def step(rate: float) -> None:
        original(rate)
        if made.history.step == at:
            raise KeyboardInterrupt

    made._step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.run()
    made.save()


def taking_turns(folder: Path, processes: Processes) -> dict[str, Any]:
    """The dense run by two processes, then one, then two."""
    source, state = open_checkpoint(folder / "teacher"), folder / "state"
    interrupt(trainer(source, pruned(source), processes, LONGER, folder=state), 1)
    if processes.is_first:
        interrupt(trainer(source, pruned(source), ALONE, LONGER, folder=state), 2)
    processes.meet()
    last = trainer(source, pruned(source), processes, LONGER, folder=state)
    assert last.history.step == 2
    return results(last)


def out_of_step(folder: Path, processes: Processes) -> dict[str, Any]:
    """A run bounded by seconds where the second process's clock goes a hundred times too fast."""
    source, kept = open_checkpoint(folder / "teacher"), time.perf_counter
    ticks = itertools.count(step=1 + 99 * processes.rank)
    time.perf_counter = lambda: float(next(ticks))
    try:
        made = trainer(source, pruned(source), processes, TrainConfig(seconds=4.0, evaluate_every=1000))
        paused = made.run(max_seconds=0.0).step
        return {**results(made), "paused": paused, "steps": made.history.step}
    finally:
        time.perf_counter = kept


def unlike(folder: Path, processes: Processes) -> str:
    """What is said where one process is given another model."""
    source = open_checkpoint(folder / "teacher")
    with pytest.raises(PowertrainError) as told:
        trainer(source, pruned(source), processes, identity={"teacher": processes.rank})
    return str(told.value)


def command(folder: Path, out: str, rank: int, port: int) -> dict[str, Any]:
    """What the command line does under torchrun's variables."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    flags = ["--data", str(folder / "text.txt"), *FLAGS]
    done = CliRunner().invoke(
        app, ["distill", str(folder / "teacher"), str(folder / "pruned"), str(folder / out), *flags]
    )
    return {"output": done.output, "exit_code": done.exit_code, "is_told": isinstance(done.exception, PowertrainError)}


def worker(rank: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{ports[0]}", rank=rank, world_size=2)
    processes = grouped("cpu")
    found = runs(folder, processes)
    found["turns"] = taking_turns(folder, processes)
    found["clock"] = out_of_step(folder, processes)
    found["unlike"] = unlike(folder, processes)
    distributed.destroy_process_group()
    found["command"] = command(folder, "by_two", rank, ports[1])
    found["taken"] = command(folder, "by_two", rank, ports[2])
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if rank == 1:

        def fail(*_: Any, **__: Any) -> None:
            raise PowertrainError("no")

        distill_run.WindowBatches = fail  # type: ignore[misc, assignment]
    found["failing"] = command(folder, "failing", rank, ports[3])
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.fixture(scope="module")
def models(tiny_model_dir: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and a text."""
    folder, teacher = tmp_path_factory.mktemp("parallel"), tiny_model_dir("mistral")
    (folder / "teacher").symlink_to(teacher)
    smaller = depth_pruned(open_checkpoint(teacher), [0, 2])
    write_checkpoint(folder / "pruned", smaller.config, iterate(smaller), hugging_face_files(teacher))
    compress(teacher, folder / "two_bits", {"steps": [{"match": "Linear", "scheme": "W2A16_ASYM", "group_size": 32}]})
    lines = "".join(f"Line {n}: the {n * 7 % 13} cats met {n * 5 % 11} dogs.\n" for n in range(200))
    (folder / "text.txt").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    """With what two processes found there, which are started once for all tests."""
    spawn(worker, (models, free_ports(4)), nprocs=2, daemon=True)
    return models


def free_ports(num: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(num)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@pytest.fixture(scope="module")
def by_two(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"found-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def by_one(folder: Path) -> dict[str, dict[str, Any]]:
    return runs(folder, ALONE)


def assert_same(found: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    assert found["ended"] == expected["ended"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=rel)
    for row, wanted in zip(found["curve"], expected["curve"], strict=True):
        assert (row["step"], row["held_out_kl"]) == pytest.approx((wanted["step"], wanted["held_out_kl"]), rel=rel)
    assert found["best"].keys() == expected["best"].keys()
    for name, tensor in expected["best"].items():
        # Adam turns a gradient's rounding error into a step where the gradient is nearly nothing
        torch.testing.assert_close(found["best"][name], tensor, rtol=0, atol=50 * rel * float(tensor.abs().max()))


EXACT = ["dense", "hidden, one window", "masked", "scales", "weights", "early stop"]


@pytest.mark.parametrize("name", [*EXACT, "bfloat16"])
def test_two_processes_train_what_one_does(by_one: dict[str, Any], by_two: list[dict[str, Any]], name: str) -> None:
    assert_same(by_two[0][name], by_one[name], 5e-3 if name == "bfloat16" else 1e-5)
    for key in ("losses", "ended"):
        assert by_two[1][name][key] == by_two[0][name][key]
    assert by_two[1][name]["best"] == {}  # only the first has the whole of them


def test_a_run_by_two_then_one_then_two_processes_is_one_run(
    by_one: dict[str, Any], by_two: list[dict[str, Any]]
) -> None:
    assert_same(by_two[0]["turns"], by_one["dense"], 1e-5)


def test_the_first_clock_decides_for_all(by_two: list[dict[str, Any]]) -> None:
    first, second = (found["clock"] for found in by_two)
    assert first["steps"] == second["steps"] > 0
    assert first["paused"] == second["paused"] == 0
    assert first["ended"] == second["ended"] == "seconds"
    assert first["curve"] == second["curve"]


def test_the_command_line_under_torchrun_writes_once(folder: Path, by_two: list[dict[str, Any]]) -> None:
    first, second = (found["command"] for found in by_two)
    assert (first["exit_code"], second["exit_code"]) == (0, 0), first["output"]
    assert "held-out KL" in first["output"]
    assert second["output"] == ""
    flags = ["--data", str(folder / "text.txt"), *FLAGS]
    out = str(folder / "by_one")
    done = CliRunner().invoke(app, ["distill", str(folder / "teacher"), str(folder / "pruned"), out, *flags])
    assert done.exit_code == 0, done.output
    one, two = (load_file(folder / name / "model.safetensors") for name in ("by_one", "by_two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4)


def test_processes_that_see_other_files_are_refused(by_two: list[dict[str, Any]]) -> None:
    assert all("one file system" in found["unlike"] for found in by_two)


@pytest.mark.parametrize("case", ["taken", "failing"])
def test_one_process_says_why_all_end(by_two: list[dict[str, Any]], case: str) -> None:
    assert [found[case]["exit_code"] for found in by_two] == [1, 1]
    assert sum(found[case]["is_told"] for found in by_two) == 1
    if case == "failing":
        assert by_two[1][case]["is_told"]


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.big),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
        ),
    ],
)
def test_torchrun_begins_with_one_process_and_ends_with_two(models: Path, device: str) -> None:
    def run(out: str, num_processes: int, *more: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_processes)]
        names = [str(models / name) for name in ("teacher", "pruned", out)]
        flags = ["--data", str(models / "text.txt"), *FLAGS[: FLAGS.index("--device")], "--device", device, *more]
        path = {"PYTHONPATH": str(Path(powertrain.__file__).parents[1])}
        command = [*launcher, "-m", "powertrain", "distill", *names, *flags]
        done = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    run("whole", 1)
    run("in_parts", 1, "--max-seconds", "0")
    run("in_parts", 2)
    whole, in_parts = (read_manifest(models / name)["curve"] for name in ("whole", "in_parts"))
    kls = [row["held_out_kl"] for row in whole]
    assert [row["held_out_kl"] for row in in_parts] == pytest.approx(kls, rel=1e-5 if device == "cpu" else 2e-2)
