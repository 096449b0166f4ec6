"""Runs verbs of the command line and kills them on the way; prints what was found as JSON. A process of its own.

Each run is a fork of this one, so that nothing is imported again and the points of the kills lie in the work itself.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from powertrain import cli
from powertrain.checkpoint.source import iterate, open_checkpoint
from powertrain.measure.record import read_record

torch.set_num_threads(1)


def run(arguments: list[str]) -> int:
    """The exit status of the command line."""
    sys.argv = ["powertrain", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def die(_descriptor: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def start(arguments: list[str], log: Path, *, dies_at_sync: bool = False) -> int:
    """The process id of the command line at work. `dies_at_sync`: killed when first it has written something whole."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if dies_at_sync:
                os.fsync = die  # type: ignore[assignment]
            status = run(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(status)


def end(child: int) -> int:
    """Its exit status; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_whole(out: Path) -> bool:
    """Whether an output can be read from end to end."""
    if out.suffix == ".json":
        read_record(out)
    elif out.suffix == ".yaml":
        return "steps:" in out.read_text() and out.read_text().endswith("\n")
    else:
        return all(bool(torch.isfinite(tensor.float()).all()) for _, tensor in iterate(open_checkpoint(out)))
    return True


def litter(out: Path) -> list[str]:
    """What lies beside the output."""
    return sorted(path.name for path in out.parent.iterdir() if path != out)


def interrupt(verb: list[str], out: Path, num_kills: int, source: random.Random) -> dict[str, object]:
    """One whole run, then kills and interrupts, then a run that must go through."""
    log = out.parent.parent / "log"
    started = time.perf_counter()
    # here, so that what it imports is there for all others
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        status = run(verb)
    seconds = (time.perf_counter() - started) / 2
    if status != 0 or not is_whole(out):
        return {"failed": log.read_text()[-2000:]}
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    wrong: list[str] = []
    num_cut = most_litter = 0
    for at in range(num_kills):
        started = time.perf_counter()
        child = start(verb, log, dies_at_sync=at == 0)
        if at > 0:
            time.sleep(seconds * (at - 1 + source.random()) / (num_kills - 1))
            os.kill(child, signal.SIGKILL if at % 2 == 0 else signal.SIGINT)
        status = end(child)
        if status == 0:
            seconds = min(seconds, time.perf_counter() - started)
        num_cut += status in (-signal.SIGKILL, 130)
        if "Traceback" in log.read_text():
            wrong.append(f"kill {at}: {log.read_text()[-1500:]}")
        if out.exists():
            if not is_whole(out):
                wrong.append(f"kill {at}: half an output")
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        most_litter = max(most_litter, len(litter(out)))
    return {
        "wrong": wrong,
        "num_cut": num_cut,
        "most_litter": most_litter,
        "last_status": end(start(verb, log)),
        "log": log.read_text()[-500:],
        "is_whole": out.exists() and is_whole(out),
        "left": litter(out),
    }


def main() -> None:
    """Arguments: a working folder and JSON {name: [arguments, file name of the output]}, `OUT` standing for it."""
    folder, cases, num_kills = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    source, results = random.Random(0), {}
    for name, (arguments, file) in cases.items():
        out = folder / name / "out" / file
        out.parent.mkdir(parents=True)
        verb = [str(out) if argument == "OUT" else argument for argument in arguments]
        results[name] = interrupt(verb, out, num_kills, source)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
