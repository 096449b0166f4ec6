"""One JSON record per measurement: what ran, on which machine, with which software, from which commit.

Standard library only at import; torch is asked about GPUs only when it is there. Records are plain dictionaries, so
that they outlive the classes of the day, and are written whole or not at all.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from powertrain.checkpoint.unfinished import under_way
from powertrain.config import physical_cores
from powertrain.types import PowertrainError

SCHEMA = 1

# The instruction sets that decide which CPU kernels can run; the full flag list says nothing more to a reader.
_NOTABLE_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "asimddp", "i8mm", "sve")
_SOFTWARE = ("torch", "triton", "numpy", "safetensors", "tokenizers")

# Fields that tell two result rows of one record apart; every other number in a row is a measurement.
_ROW_KEYS = ("name", "workload", "context", "batch", "prompt", "output", "threads")


def machine() -> dict[str, Any]:
    """CPU, cores usable by this process, memory and GPUs, JSON-ready. Sizes in bytes; unknown values are None."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cpu_flags": _cpu_flags(),
        "cores": physical_cores(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": [],
    }
    try:
        import torch
    except ImportError:
        return facts
    if torch.cuda.is_available():
        driver = _driver_version()
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpu = {"name": properties.name, "memory_bytes": properties.total_memory, "driver": driver}
            gpu["compute_capability"] = f"{properties.major}.{properties.minor}"
            gpu["multiprocessors"] = properties.multi_processor_count
            facts["gpus"].append(gpu)
    return facts


def device_line(facts: Mapping[str, Any]) -> str:
    """`machine()` in one line for people: the GPU if there is one, else the CPU with its cores and memory."""
    memory = facts.get("memory_bytes")
    host = f"{facts['cpu']}, {facts['cores']} cores" + (f", {memory / 2**30:.0f} GiB" if memory else "")
    gpus = facts.get("gpus") or []
    if not gpus:
        return host
    return f"{len(gpus)} × {gpus[0]['name']}, {gpus[0]['memory_bytes'] / 2**30:.0f} GiB (host: {host})"


def software() -> dict[str, str]:
    """Versions of powertrain, Python and the installed libraries that do the arithmetic."""
    from powertrain import __version__

    versions = {"powertrain": __version__, "python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state(commit: str | None = None) -> dict[str, Any]:
    """`{"commit", "dirty"}` of the source tree this package runs from; both None for an installed package.

    `commit` overrides the look-up: a machine that got a copy of the tree has no git to ask.
    """
    if commit is not None:
        return {"commit": commit, "dirty": None}
    folder = Path(__file__).resolve().parent
    head = _git(folder, "rev-parse", "HEAD")
    tracked = head is not None and _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is not None
    if not tracked:  # an installed copy inside somebody else's repository is not that repository's commit
        return {"commit": None, "dirty": None}
    # Records and notes are written while a benchmark runs; what can change its result is the source.
    status = _git(folder, "status", "--porcelain", "--", str(folder.parent))
    return {"commit": head, "dirty": bool(status)}


def new_record(kind: str, *, git: str | None = None, **content: Any) -> dict[str, Any]:
    """A record of `kind` with schema, UTC time, device, software and git state, then `content` in the given order."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine(),
        "software": software(),
        "git": git_state(git),
        **content,
    }


def write_record(path: str | Path, record: Mapping[str, Any]) -> Path:
    """Write `record` as JSON to `path`: the old file or the new one is there at any moment, never half of one.

    Raises `PowertrainError` naming the file if it cannot be written, and `ValueError` for NaN or infinity, which JSON
    does not have.
    """
    path = Path(path)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomically(path, text)
    return path


def write_text_atomically(path: Path, text: str) -> None:
    """Write through a temporary file beside `path` and rename it. Raises `PowertrainError` naming the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with under_way(path) as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        raise PowertrainError(f"cannot write {path}: {error.strerror or error}") from error


def read_record(path: str | Path) -> dict[str, Any]:
    """Read a record back. Raises `PowertrainError` naming the file if it is absent or not a record."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PowertrainError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise PowertrainError(f"{path} is not a JSON record: {error}") from error
    if not isinstance(record, dict) or "kind" not in record or "schema" not in record:
        raise PowertrainError(f"{path} is not a Powertrain record: it has no schema and kind")
    if record["schema"] != SCHEMA:
        raise PowertrainError(f"{path} has record schema {record['schema']!r}; this version reads {SCHEMA}")
    return record


@dataclass(frozen=True, slots=True)
class Comparison:
    """One number present in both records. `ratio` is after / before, None where before is 0."""

    name: str
    before: float
    after: float
    ratio: float | None


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Comparison]:
    """Every measurement the two records share, in the order of `before`.

    Rows of `results` are matched by what was measured (name, batch, prompt, output ...), not by position. Raises
    `PowertrainError` for records of different kinds: their numbers do not mean the same.
    """
    if before.get("kind") != after.get("kind"):
        raise PowertrainError(f"cannot compare a {before.get('kind')} record with a {after.get('kind')} record")
    theirs = dict(_measurements(after))
    rows = []
    for name, value in _measurements(before):
        if name in theirs:
            ratio = theirs[name] / value if value else None
            rows.append(Comparison(name, value, theirs[name], ratio))
    return rows


_NOT_MEASURED = frozenset({"schema", "kind", "created", "device", "software", "git", "config"})


def _measurements(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if key not in _NOT_MEASURED:
            yield from _numbers(key, value)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        yield name, float(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _ROW_KEYS:
                yield from _numbers(f"{name} {key}", inner)
    elif isinstance(value, list):
        for row in value:
            if isinstance(row, Mapping):
                label = " ".join(f"{key}={row[key]}" for key in _ROW_KEYS if key in row)
                yield from _numbers(f"{name}[{label}]", row)


def _cpu_model() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def _cpu_flags() -> list[str]:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return [flag for flag in _NOTABLE_CPU_FLAGS if flag in present]
    return []


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _driver_version() -> str | None:
    for line in _lines("/proc/driver/nvidia/version"):
        words = line.split()
        for word in words:
            if word[:1].isdigit() and word.count(".") >= 1:
                return word
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
