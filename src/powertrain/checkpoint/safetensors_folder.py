"""Hugging Face model folders: `config.json` beside one or several `.safetensors` files, read and written.

A header is checked here before the safetensors library maps the file: a hostile one gives a `ModelFileError`, never a
read past the end. Pickled weights are refused by name and code in a model folder is never run.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from powertrain.checkpoint.safetensors_write import INDEX_FILE, write_shards
from powertrain.checkpoint.unfinished import set_aside, under_way
from powertrain.types import ModelFileError, PowertrainError

MANIFEST_FILE = "powertrain.json"
"""Stands in every folder `write_checkpoint` made, so that an old output can be told from somebody's own files."""

MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
MAX_DIMS = 8
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
RUNNABLE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: its file, and its first and last byte after the header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsCheckpoint:
    """A folder of safetensors as a `Checkpoint`. All headers are checked at once, tensors are mapped when asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        generation_file = self.path / "generation_config.json"
        self.generation_config = read_json(generation_file) if generation_file.is_file() else {}
        self._entries = _read_entries(self.path)
        self._handles: dict[Path, Any] = {}

    def names(self) -> list[str]:
        return sorted(self._entries)

    def nbytes(self, name: str) -> int:
        entry = self._entry(name)
        return entry.end - entry.begin

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._entry(name).shape

    def load(self, name: str) -> torch.Tensor:
        entry = self._entry(name)
        try:
            if entry.file not in self._handles:
                self._handles[entry.file] = safe_open(entry.file, framework="pt", device="cpu")
            tensor: torch.Tensor = self._handles[entry.file].get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ModelFileError(f"{entry.file}: cannot read tensor {name}: {error}") from None
        return tensor

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise ModelFileError(f"{self.path}: there is no tensor named {name}")
        return self._entries[name]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`. Raises `ModelFileError` where it is missing or asks for code of its own to run."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelFileError(f"{folder}: no config.json; a model folder holds config.json and *.safetensors")
    config = read_json(file)
    if "auto_map" in config and config.get("model_type") not in RUNNABLE_MODEL_TYPES:
        raise ModelFileError(
            f"{file}: model_type {config.get('model_type')!r} needs code shipped with the model (auto_map), "
            f"which is never run; the families that run are {', '.join(RUNNABLE_MODEL_TYPES)}"
        )
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 64 MiB. Raises `ModelFileError` naming the file."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ModelFileError(f"{file}: larger than {MAX_JSON_BYTES} bytes, which no configuration is")
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_entries(folder: Path) -> dict[str, TensorEntry]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return read_header(_single_file(folder))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index}: no weight_map")
    files: dict[str, dict[str, TensorEntry]] = {}
    entries: dict[str, TensorEntry] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file) or not file.endswith(".safetensors"):
            raise ModelFileError(f"{index}: {name} points to {file!r}, which is not a .safetensors file of this folder")
        if file not in files:
            files[file] = read_header(folder / file)
        if name not in files[file]:
            raise ModelFileError(f"{index}: {name} is not in {file}")
        entries[name] = files[file][name]
    return entries


def _single_file(folder: Path) -> Path:
    if (folder / "model.safetensors").is_file():
        return folder / "model.safetensors"
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelFileError(f"{folder}: {len(files)} .safetensors files but no {INDEX_FILE} that says which is which")
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise ModelFileError(
            f"{folder}: {pickled[0]} is a pickle, which can run code when loaded, and is refused; "
            "convert the model to safetensors"
        )
    raise ModelFileError(f"{folder}: no .safetensors files")


def _is_plain_name(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not any(character in name for character in "/\\\0:")


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one `.safetensors` file, after checking that the header fits the file exactly.

    Checked: header length against file size, known dtypes, shapes, bytes = shape product, no overlap and no hole.
    Raises `ModelFileError` naming file and tensor. Reads the header only.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelFileError(f"{file}: header of {length} bytes in a file of {size}: truncated or damaged")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_unique_pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{file}: unreadable safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise ModelFileError(f"{file}: the safetensors header is not an object")
    header.pop("__metadata__", None)
    entries = {name: _check_entry(file, name, value) for name, value in header.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ModelFileError(f"{file}: {name} overlaps another tensor or leaves a hole at byte {position}")
        position = entry.end
    if position != size - 8 - length:
        raise ModelFileError(f"{file}: tensors take {position} bytes but {size - 8 - length} follow the header")
    return entries


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a name stands twice")
    return unique


def _check_entry(file: Path, name: str, value: Any) -> TensorEntry:
    value = value if isinstance(value, dict) else {}
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ModelFileError(f"{file}: tensor {name} has unknown dtype {dtype!r}")
    if not (isinstance(shape, list) and len(shape) <= MAX_DIMS and all(_is_size(n) for n in shape)):
        raise ModelFileError(f"{file}: tensor {name} has an impossible shape")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_size(n) for n in offsets)):
        raise ModelFileError(f"{file}: tensor {name} has impossible data_offsets")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != (end - begin) * 8:
        raise ModelFileError(f"{file}: tensor {name} needs {bits // 8} bytes but its offsets hold {end - begin}")
    return TensorEntry(file, dtype, tuple(shape), begin, end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def write_checkpoint(
    out: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    extra_files: Mapping[str, bytes | str] | None = None,
    max_shard_bytes: int = 4 * 1024**3,
    overwrite: bool = False,
) -> Path:
    """Write a model folder: `config.json`, safetensors (sharded with an index when large), `extra_files` by name.

    Everything goes to a temporary folder beside `out`, is flushed to disk and renamed: `out` is never half-written. A
    non-empty `out` is refused, unless `overwrite` is set and it is an earlier output of this function. Tensors are
    taken one at a time and none is held. Raises `PowertrainError` (a full disk, a bad name).
    """
    out = Path(out).absolute()  # so that `.` has a name and a parent
    _check_target(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with under_way(out, is_folder=True) as partial:
            write_shards(partial, tensors, max_shard_bytes)
            for name, content in _text_files(config, extra_files or {}).items():
                (partial / name).write_bytes(content.encode() if isinstance(content, str) else content)
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            _replace(partial, out)
            sync(out.parent)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        advice = "the disk is full: free some space or choose another folder" if full else str(error)
        raise PowertrainError(f"cannot write {out}: {advice}") from error
    return out


def _check_target(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise PowertrainError(f"{out} exists and is not a folder: choose another output folder")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MANIFEST_FILE).is_file():
            raise PowertrainError(f"{out} is not empty and was not written by powertrain: choose another output folder")
        if not overwrite:
            raise PowertrainError(f"{out} already holds a model: choose another folder or allow overwriting it")


def _text_files(config: Mapping[str, Any], extra_files: Mapping[str, bytes | str]) -> dict[str, bytes | str]:
    for name in extra_files:
        if not _is_plain_name(name) or name == "config.json" or name.endswith(".safetensors"):
            raise PowertrainError(f"{name!r} cannot be an extra file of a model folder")
    manifest = {MANIFEST_FILE: json.dumps({"written_by": "powertrain"}) + "\n"}
    return {**manifest, **extra_files, "config.json": json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n"}


def _replace(partial: Path, out: Path) -> None:
    """Put `partial` where `out` is. An old output is moved aside first and comes back if the second move fails."""
    if not out.is_dir() or not any(out.iterdir()):
        partial.replace(out)
        return
    with set_aside(out):
        partial.rename(out)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
