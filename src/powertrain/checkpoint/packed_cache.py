"""Packed weights in one file beside the model, so that they are packed once and only mapped afterwards.

The file is in safetensors format: a header whose data start on a page, one U8 tensor per stream on a 64-byte boundary.
Its metadata hold the streams' layouts, a fingerprint of the source and a SHA-256 over every other byte, checked at each
open. It is written beside its place and renamed. A file that is damaged, foreign or outdated is replaced; deleting it
is always safe. Where the model's folder cannot be written it lies in the cache folder, else the streams stay in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch

from powertrain.checkpoint.gguf import GGUFCheckpoint
from powertrain.checkpoint.safetensors_folder import MAX_HEADER_BYTES, sync
from powertrain.checkpoint.safetensors_write import INDEX_FILE
from powertrain.checkpoint.source import Checkpoint
from powertrain.config import cache_dir
from powertrain.model.packed import PackedLayout
from powertrain.types import ModelFileError

Stream: TypeAlias = tuple[torch.Tensor, PackedLayout]
Build: TypeAlias = Callable[[], Iterator[tuple[str, Stream]]]
"""Makes every stream of a model, one at a time, with its name."""

SUFFIX = ".packed"
VERSION = "1"
"""Counts changes of what the streams hold: a file of another version is rebuilt."""

PAGE = 4096
ALIGNMENT = 64
HEADER_BYTES_PER_STREAM = 1024
HASH_PIECE = 8 << 20
NUM_HASH_THREADS = 2
NO_HASH = "0" * 64
STALE_SECONDS = 24 * 3600.0

logger = logging.getLogger(__name__)


class _Unusable(Exception):
    """Why a cache file cannot be taken."""


def packed_streams(checkpoint: Checkpoint, build: Build) -> dict[str, Stream]:
    """The streams of `checkpoint` by name: mapped from its cache file, or built and then written to it.

    `build` runs only when there is no file that fits. What goes wrong with a cache file is never an error: another
    place is tried, and then memory. Errors of the source itself (`ModelFileError`) pass through.
    """
    fingerprint = source_fingerprint(checkpoint)
    places = cache_files(checkpoint.path)
    for file in places:
        try:
            return _read(file, fingerprint)
        except FileNotFoundError:
            continue
        except (_Unusable, OSError) as problem:
            logger.info("%s: %s: packing the weights again", file, problem)
    for file in places:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, checkpoint, fingerprint, build)
            return _read(file, fingerprint)
        except (_Unusable, OSError) as problem:
            logger.info("%s: cannot be used: %s", file, problem)
    return dict(build())


def cache_files(model: Path) -> list[Path]:
    """Where the packed weights of a model file or folder may lie, best first."""
    beside = model / f"model{SUFFIX}" if model.is_dir() else model.with_name(model.name + SUFFIX)
    digest = hashlib.sha256(os.fsencode(model.resolve())).hexdigest()
    return [beside, cache_dir() / "packed" / f"{digest[:32]}{SUFFIX}"]


def source_fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, sizes, modification times and headers of the files a checkpoint is made of."""
    digest = hashlib.sha256(VERSION.encode())
    try:
        for file, num_bytes in _heads(checkpoint).items():
            with file.open("rb") as stream:
                status = os.fstat(stream.fileno())
                digest.update(json.dumps([file.name, status.st_size, status.st_mtime_ns, num_bytes]).encode())
                digest.update(stream.read(num_bytes))
    except OSError as error:
        raise ModelFileError(f"{checkpoint.path}: cannot be read: {error}") from None
    return digest.hexdigest()


def _heads(checkpoint: Checkpoint) -> dict[Path, int]:
    """How many bytes at the start of each file say what the weights are."""
    path = checkpoint.path
    if isinstance(checkpoint, GGUFCheckpoint):
        return {path: min((entry.begin for entry in checkpoint.tensors.values()), default=0)}
    configs = [file for file in sorted(path.glob("*.json")) if file.name in ("config.json", INDEX_FILE)]
    heads = {file: file.stat().st_size for file in configs}
    return heads | {file: _safetensors_header_bytes(file) for file in sorted(path.glob("*.safetensors"))}


def _safetensors_header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return min(8 + int.from_bytes(stream.read(8), "little"), MAX_HEADER_BYTES)


# ---- reading ----


def _read(file: Path, fingerprint: str) -> dict[str, Stream]:
    with file.open("rb") as opened:
        try:
            # a private mapping: writable as torch wants it, and never written back
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError:
            raise _Unusable("it is empty") from None
    data_begin = 8 + int.from_bytes(data[:8], "little")
    if data_begin > min(len(data), MAX_HEADER_BYTES) or data_begin % PAGE:
        raise _Unusable("its header is damaged")
    head = data[:data_begin]
    header = _parse(head[8:])
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("version") != VERSION or metadata.get("source") != fingerprint:
        raise _Unusable("it was made from another model file or by another version")
    stated = metadata.get("sha256")
    if not isinstance(stated, str) or head.count(stated.encode()) != 1:
        raise _Unusable("it states no hash")
    if _hash(head.replace(stated.encode(), NO_HASH.encode()), data) != stated:
        raise _Unusable("its hash is wrong")
    return {name: _stream(data, data_begin, header.get(name), layout) for name, layout in _layouts(metadata).items()}


def _parse(text: bytes | str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise _Unusable("its header is no JSON") from None
    if not isinstance(value, dict):
        raise _Unusable("its header is no JSON object")
    return value


def _layouts(metadata: dict[str, Any]) -> dict[str, PackedLayout]:
    try:
        return {name: PackedLayout(**fields) for name, fields in _parse(metadata.get("layouts") or "").items()}
    except (TypeError, ValueError) as error:
        raise _Unusable(f"a layout means nothing: {error}") from None


def _stream(data: mmap.mmap, data_begin: int, entry: Any, layout: PackedLayout) -> Stream:
    """One stream as a view of the mapping, after checking that all of it lies inside."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise _Unusable("a stream has no place")
    begin, end = offsets
    if begin < 0 or begin % ALIGNMENT or end > len(data) - data_begin or end - begin < layout.num_bytes:
        raise _Unusable("a stream lies outside the file")
    count = layout.num_bytes
    return torch.frombuffer(data, dtype=torch.uint8, count=count, offset=data_begin + begin), layout


def _hash(head: bytes, data: mmap.mmap) -> str:
    """SHA-256 of the header (its own hash as zeros) and of the hashes of the pieces after it, taken in threads."""
    with memoryview(data) as view, ThreadPoolExecutor(NUM_HASH_THREADS) as threads:

        def piece(begin: int) -> bytes:
            with view[begin : begin + HASH_PIECE] as part:
                return hashlib.sha256(part).digest()

        pieces = list(threads.map(piece, range(len(head), len(data), HASH_PIECE)))
    return hashlib.sha256(head + b"".join(pieces)).hexdigest()


# ---- writing ----


def _write(file: Path, checkpoint: Checkpoint, fingerprint: str, build: Build) -> None:
    """Leaves a whole, flushed file at `file`, or raises and leaves what was there."""
    _remove_stale_partials(file)
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("x+b") as opened:
            # each stream holds at least one tensor, so this is enough for what will be known only after the last one
            data_begin = _round_up(PAGE + HEADER_BYTES_PER_STREAM * len(checkpoint.names()), PAGE)
            header = _write_streams(opened, data_begin, build)
            if source_fingerprint(checkpoint) != fingerprint:
                raise _Unusable("the model's files changed while they were read")
            _write_header(opened, data_begin, header, fingerprint)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    sync(file.parent)


def _write_streams(opened: BinaryIO, data_begin: int, build: Build) -> dict[str, Any]:
    """The header's entries of the streams written from `data_begin` on."""
    entries: dict[str, Any] = {}
    layouts: dict[str, Any] = {}
    position = 0
    opened.seek(data_begin)
    for name, (stream, layout) in build():
        end = _round_up(position + stream.numel(), ALIGNMENT)
        opened.write(stream.contiguous().numpy().data)
        opened.write(bytes(end - position - stream.numel()))
        entries[name] = {"dtype": "U8", "shape": [end - position], "data_offsets": [position, end]}
        layouts[name] = asdict(layout)
        position = end
    return {"__metadata__": {"layouts": json.dumps(layouts)}, **entries}


def _write_header(opened: BinaryIO, data_begin: int, header: dict[str, Any], fingerprint: str) -> None:
    header["__metadata__"] |= {"version": VERSION, "source": fingerprint, "sha256": NO_HASH}
    text = json.dumps(header).encode()
    if 8 + len(text) > data_begin:
        raise _Unusable("the header is larger than the room kept for it")
    head = (data_begin - 8).to_bytes(8, "little") + text.ljust(data_begin - 8)
    opened.flush()
    with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        digest = _hash(head, data)
    opened.seek(0)
    opened.write(head.replace(NO_HASH.encode(), digest.encode()))


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _remove_stale_partials(file: Path) -> None:
    """What writers that were killed have left; those of today may still be at work."""
    for partial in file.parent.glob(f".{file.name}.*.partial"):
        if time.time() - partial.stat().st_mtime > STALE_SECONDS:
            partial.unlink(missing_ok=True)
