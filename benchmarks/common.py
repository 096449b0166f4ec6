"""What the benchmark scripts share: where records go, a server on a free port, prompts of plain words."""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from powertrain.measure import record

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
_WORDS = ("time", "house", "river", "light", "hand", "day", "mountain", "letter", "water", "story", "garden", "music")


def parser(about: str | None, default_name: str) -> argparse.ArgumentParser:
    """A parser with the flags every script has; `about` is the script's own docstring."""
    made = argparse.ArgumentParser(description=(about or "").split("\n\n", maxsplit=1)[0])
    made.add_argument("--json", type=Path, default=RESULTS / default_name, help="where to write the record")
    made.add_argument("--git", help="commit to record where git is missing")
    return made


def write(path: Path, made: dict[str, Any]) -> None:
    """Write the record and say where."""
    print(f"wrote {record.write_record(path, made)}")


def words(count: int, source: random.Random) -> str:
    """A prompt of `count` plain words."""
    return " ".join(source.choice(_WORDS) for _ in range(count))


@contextmanager
def server(model: str, *flags: str, timeout_s: float = 120.0) -> Iterator[str]:
    """A `powertrain serve` process on a free loopback port; yields its URL once it is healthy, ends it with SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "powertrain", "serve", model, "--host", "127.0.0.1", "--port", str(port), *flags]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(process, url, timeout_s)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def server_processes() -> tuple[int, int]:
    """Process ids of the one server this script has started: the web process and its engine."""
    [web] = [child for child in _children(os.getpid()) if b"serve" in Path(f"/proc/{child}/cmdline").read_bytes()]
    [engine] = _children(web)
    return web, engine


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, timeout_s: float) -> None:
    import httpx  # here, for the scripts that start no server and run where it is not installed

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server ended with status {process.returncode} before it was ready")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    sys.exit(f"the server was not healthy after {timeout_s:.0f} s")
