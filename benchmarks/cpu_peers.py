"""Powertrain beside llama.cpp and OpenVINO on this CPU, all in one run: only ratios of one run are claims.

Every contender is a process of its own that keeps its model loaded and computes only when asked; they take turns in
rounds, and memory bandwidth is measured before each. docs/cpu-peers.md says how peers are installed and what is fair.
With --fidelity TEXT it measures the formats' KL instead, which later runs of the speed show in their rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, parser, server, write
from peers.contender import Contender, Worker
from peers.fidelity import measure_fidelity, text_windows
from peers.http_load import http_rate
from peers.prepare import HERE, OPENVINO_EXPORTS, compressed_folder, llamacpp_file, openvino_folder
from peers.report import Fidelity, show, work_rows
from peers.works import WORKS, Turn, Work, fastest_settings, quick, take_turns, turn_of

from powertrain.checkpoint.hub import resolve_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import cache_dir, physical_cores
from powertrain.measure import record
from powertrain.measure.roofline import read_bandwidth
from powertrain.types import PowertrainError

LLAMACPP_FORMATS = ("Q4_0", "Q8_0", "F16")
OUR_RECIPES = {"W8A16": ("W8A16", None), "W4A16 g32": ("W4A16_ASYM", 32)}
OPENVINO_FORMATS = {"int8": "int8 per channel", "int4": "int4 symmetric, groups of 64"}
OURS = "powertrain"
IDLE_SHARE = 0.02


def main() -> None:
    given = _arguments()
    torch.set_num_threads(given.threads)
    source = resolve_model(given.model)
    try:
        contenders = _contenders(given, source)
        with tempfile.TemporaryDirectory() as logs, ExitStack() as stack:
            workers = [
                stack.enter_context(Worker(contender, Path(logs) / f"{number}.log"))
                for number, contender in enumerate(contenders)
            ]
            if given.fidelity:
                _fidelity(given, source, workers)
            else:
                _speed(given, workers)
    except PowertrainError as error:
        sys.exit(f"error: {error}")


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__, "cpu_peers.json")
    arguments.add_argument("--model", default="smollm2", help="a GGUF file or the name of a model that is one")
    arguments.add_argument("--llama-python", type=Path, help="python of an environment with llama-cpp-python")
    arguments.add_argument("--openvino-python", type=Path, help="python of one with openvino-genai and optimum-intel")
    arguments.add_argument("--prepared", type=Path, default=cache_dir() / "peers", help="where peers' models are kept")
    arguments.add_argument("--threads", type=int, default=physical_cores())
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--work", default=",".join(work.name for work in WORKS), help="names, separated by commas")
    arguments.add_argument("--only", default="", help="contenders whose names contain one of these")
    arguments.add_argument("--quick", action="store_true", help="two rounds of short work, to see that all runs")
    arguments.add_argument("--fidelity", type=Path, metavar="TEXT", help="measure KL on this text file instead")
    arguments.add_argument("--num-tokens", type=int, default=20480, help="of the text, in windows of --window")
    arguments.add_argument("--window", type=int, default=512)
    arguments.add_argument("--fidelity-json", type=Path, default=RESULTS / "cpu_fidelity.json")
    return arguments.parse_args()


def _contenders(given: argparse.Namespace, source: Path) -> list[Contender]:
    """Ours, and every peer whose environment is given, its models prepared."""
    threads = str(given.threads)

    def ours(name: str, format_name: str, file: Path) -> Contender:
        command = (sys.executable, str(HERE / "powertrain_worker.py"), str(file), threads, "{}")
        return Contender(name=name, format=format_name, command=command, is_ours=True)

    made = [ours(OURS, "Q4_1", source)]
    for name, recipe in OUR_RECIPES.items():
        made.append(ours(f"{OURS} {name}", name, compressed_folder(source, given.prepared, name, recipe)))
    if given.llama_python:
        files = {"Q4_1": source}
        files |= {name: llamacpp_file(source, given.prepared, name, given.llama_python) for name in LLAMACPP_FORMATS}
        made.append(ours(f"{OURS} Q4_0", "Q4_0", files["Q4_0"]))  # llama.cpp's fastest format, from its own file
        for name, file in files.items():
            command = (str(given.llama_python), str(HERE / "llamacpp_worker.py"), str(file), threads)
            checkpoint = open_checkpoint(file)
            num_bytes = sum(checkpoint.nbytes(tensor) for tensor in checkpoint.names())
            made.append(Contender(name=f"llama.cpp {name}", format=name, command=command, weight_bytes=num_bytes))
    if given.openvino_python:
        for name in OPENVINO_EXPORTS:
            folder = openvino_folder(source, given.prepared, name, given.openvino_python)
            command = (str(given.openvino_python), str(HERE / "openvino_worker.py"), str(folder), threads)
            made.append(Contender(name=f"OpenVINO {name}", format=OPENVINO_FORMATS[name], command=command))
    wanted = [part for part in given.only.split(",") if part]
    return [one for one in made if not wanted or any(part in one.name for part in wanted)]


def _fidelity(given: argparse.Namespace, source: Path, workers: Sequence[Worker]) -> None:
    windows = text_windows(source, given.fidelity, given.window, given.num_tokens)
    found = measure_fidelity(source, windows, workers)
    made = record.new_record("cpu_fidelity", git=given.git, model=given.model, data=given.fidelity.name, **found)
    for row in found["results"]:
        print(f"{row['name']:<16} KL {row['kl_mean']:.6f}  top-1 {row['top1_agreement']:.2%}")
    for pair in found["same_format"]:
        low, high = pair["interval"]
        print(f"{pair['ours']} less {pair['peer']}: KL {pair['kl_mean_difference']:+.6f} ({low:+.6f} to {high:+.6f})")
    write(given.fidelity_json, made)


def _speed(given: argparse.Namespace, workers: Sequence[Worker]) -> None:
    known = {work.name: work for work in WORKS}
    names = given.work.split(",")
    if unknown := [name for name in names if name not in known]:
        raise PowertrainError(f"--work {unknown[0]}: the works are {', '.join(known)}")
    rounds = 2 if given.quick else given.rounds
    fidelity = _fidelity_rows(given.fidelity_json)
    results: list[dict[str, Any]] = []
    conditions = []
    about = [_about(worker, fidelity) for worker in workers]
    config = {"threads": given.threads, "rounds": rounds, "quick": given.quick}
    for work in (quick(known[name]) if given.quick else known[name] for name in names):
        rows, condition = _measure(given, work, workers, rounds, fidelity)
        results += rows
        conditions.append(condition)
        # after every work: what an hour has found must not depend on its last minute
        content = {"config": config, "idle_cpu_share": _idle_shares(workers), "contenders": about}
        made = record.new_record("cpu_peers", git=given.git, model=given.model, **content, conditions=conditions)
        record.write_record(given.json, {**made, "results": results})
    show(results, about)
    print(f"wrote {given.json}")


def _measure(
    given: argparse.Namespace, work: Work, workers: Sequence[Worker], rounds: int, fidelity: Fidelity
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one work, and under which conditions they were measured."""
    bandwidths: list[float] = []
    loads: list[float] = []

    def before_round() -> None:
        loads.append(os.getloadavg()[0])
        bandwidths.append(read_bandwidth("cpu"))

    behind = {worker.name: worker for worker in workers}
    with ExitStack() as stack:
        settings = {worker.name: fastest_settings(worker, work) for worker in workers}
        turns = {worker.name: turn_of(stack, worker, work, settings[worker.name], rounds) for worker in workers}
        if work.kind == "requests" and OURS in behind:
            for name, turn in _http_turns(stack, given, work).items():
                turns[name], behind[name] = turn, behind[OURS]
        rates = take_turns(turns, rounds, before_round)
        before_round()
    bandwidth = statistics.median(bandwidths)
    rows = work_rows(work, rates, behind, settings, bandwidth, fidelity)
    for row in rows:
        ratio = f"  {row['ratio_to_best_peer']:.2f} x best peer" if "ratio_to_best_peer" in row else ""
        print(f"{work.name:<13} {row['name']:<26} {row['median_tokens_per_s']:>8.1f} tok/s{ratio}", flush=True)
    return rows, {"workload": work.name, "read_bytes_per_s": bandwidths, "load_average": loads}


def _http_turns(stack: ExitStack, given: argparse.Namespace, work: Work) -> dict[str, Turn]:
    """Our server in place of the engine, answering whole and streamed; it runs as long as `stack`."""
    flags = ("--threads", str(given.threads), "--device", "cpu", "--no-enable-prefix-caching")
    url = stack.enter_context(server(given.model, *flags))
    vocab_size = int(open_checkpoint(resolve_model(given.model)).config["vocab_size"])
    turns: dict[str, Turn] = {
        f"{OURS} HTTP": lambda: http_rate(url, work, vocab_size, is_streamed=False),
        f"{OURS} HTTP streamed": lambda: http_rate(url, work, vocab_size, is_streamed=True),
    }
    for turn in turns.values():
        turn()  # first connections, first batch of this size
    return turns


def _fidelity_rows(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier --fidelity run found, by contender; nothing if there was none."""
    return {row["name"]: row for row in record.read_record(path)["results"]} if path.exists() else {}


def _about(worker: Worker, fidelity: Fidelity) -> dict[str, Any]:
    found = fidelity.get(worker.name, {})
    shown = {key: found[key] for key in ("kl_mean", "top1_agreement") if key in found}
    made = {"name": worker.name, **worker.about, "weight_bytes": worker.weight_bytes, **shown}
    return {**made, "format": worker.contender.format}


def _idle_shares(workers: Sequence[Worker]) -> dict[str, float | None]:
    """The share of one core each idle contender takes: one that spins would slow the others down."""
    before = [worker.cpu_seconds() for worker in workers]
    start = time.perf_counter()
    time.sleep(2.0)
    seconds = time.perf_counter() - start
    shares: dict[str, float | None] = {}
    for worker, first in zip(workers, before, strict=True):
        last = worker.cpu_seconds()
        shares[worker.name] = None if first is None or last is None else (last - first) / seconds
        if (shares[worker.name] or 0) > IDLE_SHARE:
            print(f"warning: {worker.name} takes {shares[worker.name]:.0%} of a core while idle")
    return shares


if __name__ == "__main__":
    main()
