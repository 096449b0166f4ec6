"""GGUF files, version 3, little endian: written one tensor at a time, whole or not at all.

The header is as long whatever the tensors' types turn out to be, so it is written twice: with blanks, to find where the
data begin, and for good once every tensor lies in its place.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import errno
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from powertrain.checkpoint.gguf import ARRAY, BLOCK_TYPES, BOOL, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING
from powertrain.checkpoint.safetensors_folder import sync
from powertrain.checkpoint.unfinished import under_way
from powertrain.types import PowertrainError

VERSION = 3
UINT32, INT32, FLOAT32, UINT64, INT64 = 4, 5, 6, 10, 11
TYPE_IDS = {block.name: type_id for type_id, block in BLOCK_TYPES.items()}

FILE_TYPE = "general.file_type"
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11} | {
    "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32
}  # fmt: skip
"""What llama.cpp calls a file by the type of most of its weights."""

Blocks = tuple[str, npt.NDArray[np.uint8]]
"""A tensor's type and its rows, uint8 [rows, bytes per row]."""


def write_gguf(
    out: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Blocks]],
    overwrite: bool = False,
) -> dict[str, str]:
    """Write `tensors`, which come in the order of `shapes` (outermost size first), under GGUF names.

    `metadata` holds strings, booleans, integers, floats and lists of one of these; `general.file_type` is added. All
    goes to a file beside `out`, which is flushed and renamed. Returns each tensor's type. Raises `PowertrainError` for
    an `out` that exists (unless `overwrite`, and it is a file) or cannot be written.
    """
    out = Path(out).absolute()
    if out.is_dir() or (out.exists() and not overwrite):
        raise PowertrainError(f"{out} exists{': give the name of a file' if out.is_dir() else ' already: --overwrite'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with under_way(out) as partial:
            with partial.open("wb") as file:
                types = _write(file, metadata, shapes, tensors)
            sync(partial)
            partial.replace(out)
            sync(out.parent)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "the disk is full: free some space or choose another folder" if is_full else error.strerror
        raise PowertrainError(f"cannot write {out}: {advice}") from error
    return types


def _write(
    file: BinaryIO,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Blocks]],
) -> dict[str, str]:
    entries = dict.fromkeys(shapes, ("F32", 0))
    file.write(_header({**metadata, FILE_TYPE: 0}, shapes, entries))
    begin = _pad(file)
    num_weights: Counter[str] = Counter()
    for name, (type_name, rows) in tensors:
        _check_size(name, type_name, shapes[name], rows)
        entries[name] = (type_name, file.tell() - begin)
        num_weights[type_name] += int(np.prod(shapes[name]))
        file.write(np.ascontiguousarray(rows).data)
        _pad(file)
    [(most, _)] = num_weights.most_common(1)
    file.seek(0)
    file.write(_header({**metadata, FILE_TYPE: FILE_TYPES[most]}, shapes, entries))
    return {name: type_name for name, (type_name, _) in entries.items()}


def _check_size(name: str, type_name: str, shape: tuple[int, ...], rows: npt.NDArray[np.uint8]) -> None:
    block = BLOCK_TYPES[TYPE_IDS[type_name]]
    if rows.nbytes * block.num_weights != int(np.prod(shape)) * block.num_bytes:
        raise ValueError(f"{name}: {rows.nbytes} bytes are not {list(shape)} weights of {type_name}")


def _pad(file: BinaryIO) -> int:
    """Zeros up to the next aligned place, which is returned."""
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))
    return file.tell()


def _header(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], entries: Mapping[str, tuple[str, int]]
) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(shapes), len(metadata))]
    parts += [_string(key) + _value(key, value) for key, value in metadata.items()]
    for name, shape in shapes.items():
        type_name, offset = entries[name]
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(_string(name) + sizes + struct.pack("<IQ", TYPE_IDS[type_name], offset))
    return b"".join(parts)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(key: str, value: Any) -> bytes:
    """A value behind the number of its type. Lists are of the type that fits all of their items."""
    if not isinstance(value, list):
        type_id = _scalar_type(key, [value], UINT32)
        return struct.pack("<I", type_id) + _items(type_id, [value])
    type_id = _scalar_type(key, value, INT32)
    return struct.pack("<IIQ", ARRAY, type_id, len(value)) + _items(type_id, value)


def _items(type_id: int, values: list[Any]) -> bytes:
    if type_id == STRING:
        return b"".join(_string(value) for value in values)
    return struct.pack(f"<{len(values)}{SCALARS[type_id]}", *values)


def _scalar_type(key: str, values: list[Any], integer: int) -> int:
    """The GGUF type of all `values`; `integer` is the one that integers have where they fit."""
    if all(isinstance(value, str) for value in values):
        return STRING
    if all(isinstance(value, bool) for value in values):
        return BOOL
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        for type_id, low, high in (
            (integer, *((0, 2**32) if integer == UINT32 else (-(2**31), 2**31))),
            (INT32, -(2**31), 2**31),
            (UINT64, 0, 2**64),
            (INT64, -(2**63), 2**63),
        ):
            if low <= min(values) and max(values) < high:
                return type_id
    if all(isinstance(value, float) for value in values):
        return FLOAT32
    raise PowertrainError(f"the metadata {key} is of no type that a GGUF file holds")
