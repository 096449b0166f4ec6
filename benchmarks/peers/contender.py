"""The measuring side: contenders as processes that keep their model loaded and work only when asked."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from powertrain.types import PowertrainError


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """What to start. `weight_bytes` is what a step reads of the weights, None where the contender says so itself."""

    name: str
    format: str
    command: tuple[str, ...]
    weight_bytes: int | None = None
    is_ours: bool = False


class Worker:
    """A started contender: one JSON line out, one in. Use as a context manager; its end closes the process."""

    def __init__(self, contender: Contender, log: Path) -> None:
        """`log` takes what the process prints. Raises `PowertrainError` with its tail if the process does not start."""
        self.contender = contender
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                contender.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.about = self._read()

    @property
    def name(self) -> str:
        return self.contender.name

    @property
    def weight_bytes(self) -> int:
        return int(self.contender.weight_bytes or self.about["weight_bytes"])

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Call one method of the contender. Raises `PowertrainError` with what it says went wrong."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def cpu_seconds(self) -> float | None:
        """CPU time of the process so far, all threads; None where the system does not tell."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text(errors="replace")[-1000:]
            raise PowertrainError(f"{self.name} ended with status {self._process.wait()}: {tail}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PowertrainError(f"{self.name}: {answer['error']}")
        return answer
