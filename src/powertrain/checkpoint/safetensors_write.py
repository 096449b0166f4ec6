"""Safetensors files written as their tensors come, one in memory at a time, where the format's library wants them all.

The header stands first and the library sorts by the size of elements, so that each tensor begins at a multiple of it;
neither is known before the last tensor. So tensors go to spools, one for each size of elements, which are joined below
the header in the end: written twice, held never.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from powertrain.types import PowertrainError

INDEX_FILE = "model.safetensors.index.json"
HEADER_ALIGNMENT = 8
COPY_BYTES = 1 << 22

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.bool: "BOOL",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}


class SafetensorsFile:
    """One file under way. `close` makes it; before that there are only spools beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self.names: set[str] = set()
        self._spools: dict[int, BinaryIO] = {}
        self._entries: dict[int, list[tuple[str, str, list[int], int]]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor, whose bytes are on the disk then. Raises `PowertrainError` for a type the format lacks."""
        if tensor.dtype not in _DTYPE_NAMES:
            raise PowertrainError(f"{name}: {tensor.dtype} cannot be stored as safetensors")
        size = tensor.element_size()
        if size not in self._spools:
            self._spools[size] = self._spool_path(size).open("wb")
            self._entries[size] = []
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._spools[size].write(flat.view(torch.uint8).numpy().data)
        self._entries[size].append((name, _DTYPE_NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes))
        self.names.add(name)
        self.num_bytes += tensor.nbytes

    def close(self) -> None:
        """Write the file: header, then the spools, largest elements first."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for size in sorted(self._spools, reverse=True):
            self._spools[size].close()
            for name, dtype, shape, num_bytes in self._entries[size]:
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + num_bytes]}
                position += num_bytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        with self.path.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for size in sorted(self._spools, reverse=True):
                with self._spool_path(size).open("rb") as spool:
                    shutil.copyfileobj(spool, out, COPY_BYTES)
                self._spool_path(size).unlink()

    def abandon(self) -> None:
        """Close the spools, whose folder is about to go."""
        for spool in self._spools.values():
            spool.close()

    def _spool_path(self, size: int) -> Path:
        return self.path.with_suffix(f".{size}.spool")


def write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> None:
    """`model.safetensors`, or several files of about `max_shard_bytes` with an index, as Hugging Face names them.

    Raises `PowertrainError` where no tensor comes or a name comes twice, and `OSError`.
    """
    files: list[SafetensorsFile] = []
    seen: set[str] = set()
    try:
        for name, tensor in tensors:
            if name in seen:
                raise PowertrainError(f"two tensors are named {name}")
            seen.add(name)
            if not files or (files[-1].num_bytes and files[-1].num_bytes + tensor.nbytes > max_shard_bytes):
                if files:
                    files[-1].close()
                files.append(SafetensorsFile(folder / f"{len(files) + 1}.safetensors"))
            files[-1].add(name, tensor)
        if not files:
            raise PowertrainError("no tensors to write")
        files[-1].close()
    finally:
        for file in files[-1:]:
            file.abandon()
    _name_shards(folder, files)


def _name_shards(folder: Path, files: list[SafetensorsFile]) -> None:
    if len(files) == 1:
        files[0].path.rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.path.rename(folder / name)
        weight_map |= dict.fromkeys(file.names, name)
    metadata = {"total_size": sum(file.num_bytes for file in files)}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
