"""Runs servers for the tests: each is a process of its own, on a free loopback port, ended whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
START_TIMEOUT_S = 60


class ServerProcess:
    """One `serve(...)`. `fake` runs the engine of `fake_worker.py` in place of the real one."""

    def __init__(self, model: Path, engine: dict[str, Any], server: dict[str, Any], *, fake: bool = False) -> None:
        options = {"model": str(model), "engine": engine, "server": {"port": 0, **server}, "fake": fake}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server_main.py"), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.stderr: list[str] = []
        self._lines: list[str] = []
        self._is_up = threading.Event()
        self._readers = [
            threading.Thread(target=self._read_stdout, daemon=True),
            threading.Thread(target=self._read_stderr, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_stdout(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            self._is_up.set()
        self._is_up.set()

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.stderr.append(line)

    def wait_ready(self) -> ServerProcess:
        if not self._is_up.wait(START_TIMEOUT_S) or not self._lines:
            self.kill()
            raise AssertionError(f"the server did not start: {''.join(self.stderr)[-3000:]}")
        return self

    @property
    def start_line(self) -> str:
        return self._lines[0]

    @property
    def port(self) -> int:
        return int(self.start_line.split("http://127.0.0.1:")[1].split()[0])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    @property
    def engine_pid(self) -> int:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        (child,) = [int(c) for c in children if b"worker" in Path(f"/proc/{c}/cmdline").read_bytes()]
        return child

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 15) -> int:
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.kill()
        for reader in self._readers:
            reader.join(5)
        return self.process.returncode

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


Start = Callable[..., ServerProcess]
"""What the `start` fixture gives: server options in, a process that may not be ready yet out."""


def wait_until(condition: Callable[[], bool], timeout_s: float = 10, what: str = "the condition") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true in {timeout_s} s"
        time.sleep(0.02)


def metric(client: httpx.Client, name: str) -> float:
    """The sum of a metric's samples over all labels."""
    values = [
        float(line.rsplit(" ", 1)[1])
        for line in client.get("/metrics").text.splitlines()
        if line.split("{")[0] == f"vllm:{name}"
    ]
    assert values, f"no metric {name}"
    return sum(values)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def events(text: str) -> list[Any]:
    """The events of a whole stream; the last one must be [DONE]."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts), parts
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]
