"""GGUF files, versions 2 and 3, little endian: metadata, tensor directory and raw blocks, memory-mapped.

Every count, length, shape and offset is checked against the file before memory is taken or bytes are read; a damaged or
hostile file gives a `ModelFileError`. No torch until a tensor is loaded, so that a tokenizer can be read without it.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from powertrain.checkpoint.gguf_config import config_from_metadata, generation_config_from_metadata
from powertrain.types import ModelFileError

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_METADATA_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_ARRAY_ITEMS = 1 << 24  # 60 times the largest vocabulary in use; a list of them is still small
MAX_ARRAY_DEPTH = 3
MAX_HEADER_BYTES = 1 << 28  # the largest in use take some tens of megabytes
MAX_NAME_LENGTH = 256
MAX_DIMS = 4

STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type -> struct and numpy character."""


@dataclass(frozen=True, slots=True)
class BlockType:
    """A ggml storage type: `num_bytes` hold `num_weights` consecutive weights of a row."""

    name: str
    num_weights: int
    num_bytes: int


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}
REFUSED_TYPE_NAMES = {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL"} | {
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its shape outermost first (the file stores it innermost first) and its bytes in the file."""

    block_type: BlockType
    shape: tuple[int, ...]
    begin: int
    num_bytes: int


class GGUFCheckpoint:
    """A `.gguf` file of a llama, qwen2 or qwen3 model as a `Checkpoint`, in Hugging Face names and row order.

    `metadata` holds the file's own key-values, arrays as lists. Raises `ModelFileError` for anything unreadable.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data = _map_file(self.path)
        reader = _Reader(self.path, self._data)
        self.metadata, self.tensors = reader.read_all()
        self._gguf_names = _hugging_face_names(self.path, self.tensors)
        try:
            self.config = config_from_metadata(self.metadata, {n: t.shape for n, t in self.tensors.items()})
            self.generation_config = generation_config_from_metadata(self.metadata)
        except ModelFileError as error:
            raise ModelFileError(f"{self.path}: {error}") from None
        if "rope_freqs.weight" in self.tensors:
            self.config["rope_factors"] = self._rope_factors()

    def names(self) -> list[str]:
        return sorted(self._gguf_names)

    def nbytes(self, name: str) -> int:
        return self._entry(name).num_bytes

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._entry(name).shape

    def raw(self, name: str) -> tuple[str, npt.NDArray[np.uint8], tuple[int, ...]]:
        """(ggml type name, blocks as uint8 [rows, bytes per row], shape). Rows are in Hugging Face order.

        A view of the mapped file, except for the q/k matrices of llama files, whose rows are put back in order.
        """
        entry = self._entry(name)
        rows = self._rows(entry)
        if self.config["model_type"] in ("llama", "mistral") and re.search(r"\.[qk]_proj\.(weight|bias)$", name):
            rows = self._unpermute(name, rows)
        return entry.block_type.name, rows, entry.shape

    def load(self, name: str) -> torch.Tensor:
        from powertrain.checkpoint.gguf_blocks import dequantize

        type_name, rows, shape = self.raw(name)
        return dequantize(type_name, rows).view(shape)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._gguf_names:
            raise ModelFileError(f"{self.path}: there is no tensor named {name}")
        return self.tensors[self._gguf_names[name]]

    def _rows(self, entry: TensorEntry) -> npt.NDArray[np.uint8]:
        flat = np.frombuffer(self._data, np.uint8, entry.num_bytes, entry.begin)
        return flat.reshape(math.prod(entry.shape[:-1]), -1)

    def _unpermute(self, name: str, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Undo the interleaving of the two halves of each head that llama.cpp's rope over adjacent pairs wants."""
        head_dim = self.config["head_dim"]
        entry = self._entry(name)
        if len(entry.shape) == 1 and entry.block_type.num_weights == 1:  # a bias: its elements are the rows
            rows = rows.reshape(entry.shape[0], -1)
        if head_dim % 2 or len(rows) % head_dim:
            raise ModelFileError(f"{self.path}: {name} has {len(rows)} rows, which heads of {head_dim} do not divide")
        return rows.reshape(-1, head_dim // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    def _rope_factors(self) -> list[float]:
        entry = self.tensors["rope_freqs.weight"]
        if entry.block_type.name != "F32" or entry.shape != (self.config["head_dim"] // 2,):
            raise ModelFileError(f"{self.path}: rope_freqs.weight is not float32 with one value per rope frequency")
        factors: list[float] = self._rows(entry).view("<f4")[0].tolist()
        if not all(math.isfinite(factor) and factor > 0 for factor in factors):
            raise ModelFileError(f"{self.path}: rope_freqs.weight holds a factor that is not positive")
        return factors


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # a private mapping: writable as torch wants it, and never written back
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from None


class _Reader:
    """A cursor over the header. Each method checks that what it is about to read lies inside the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.limit = min(self.size, MAX_HEADER_BYTES)
        self.position = 0

    def fail(self, problem: str) -> NoReturn:
        raise ModelFileError(f"{self.path}: damaged GGUF file: {problem}")

    def read_all(self) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        if self.size < 24 or self.data[:4] != MAGIC:
            raise ModelFileError(f"{self.path}: not a GGUF file")
        self.position = 4
        version = self.scalar(4)
        if version not in VERSIONS:
            big_endian = int(version).to_bytes(4, "little") in (b"\0\0\0\2", b"\0\0\0\3")
            kind = "big-endian files" if big_endian else f"version {version}"
            raise ModelFileError(f"{self.path}: GGUF {kind} cannot be read; versions 2 and 3, little endian, can")
        num_tensors = self.count("tensors", self.scalar(10), MAX_TENSORS, min_bytes=24)
        num_keys = self.count("metadata keys", self.scalar(10), MAX_METADATA_KEYS, min_bytes=13)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                self.fail(f"the key {key[:80]!r} stands twice")
            metadata[key] = self.value(self.scalar(4))
        return metadata, self.directory(num_tensors, self.alignment(metadata))

    def scalar(self, value_type: int) -> Any:
        character = SCALARS[value_type]
        size = struct.calcsize("<" + character)
        if self.position + size > self.limit:
            self.fail("it ends inside its header")
        (value,) = struct.unpack_from("<" + character, self.data, self.position)
        self.position += size
        return value

    def count(self, what: str, value: int, limit: int, min_bytes: int) -> int:
        """`value` if that many items of at least `min_bytes` fit in the rest of the file and are not absurd."""
        if value > limit or value * min_bytes > self.limit - self.position:
            self.fail(f"it claims {value} {what}")
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        # one tight loop: a vocabulary and its merges are 100 thousand of these
        data, position, limit = self.data, self.position, self.limit
        unpack = struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                begin = position + 8
                position = begin + unpack(data, position)[0]
                if position > limit:
                    self.fail("a string runs past the end")
                found.append(data[begin:position].decode())
        except struct.error:
            self.fail("it ends inside its header")
        except UnicodeDecodeError:
            self.fail(f"a string at byte {begin} is not UTF-8")
        self.position = position
        return found

    def value(self, value_type: int, depth: int = 0) -> Any:
        if value_type in SCALARS:
            return self.scalar(value_type)
        if value_type == STRING:
            return self.string()
        if value_type != ARRAY:
            self.fail(f"unknown value type {value_type}")
        if depth == MAX_ARRAY_DEPTH:
            self.fail("arrays nested too deep")
        item_type, length = self.scalar(4), self.scalar(10)
        if item_type in SCALARS:
            dtype = np.dtype(SCALARS[item_type]).newbyteorder("<")
            self.count("array items", length, MAX_ARRAY_ITEMS, min_bytes=dtype.itemsize)
            items = np.frombuffer(self.data, dtype, length, self.position)
            self.position += items.nbytes
            return items.tolist()
        self.count("array items", length, MAX_ARRAY_ITEMS, min_bytes=8)
        if item_type == STRING:
            return self.strings(length)
        return [self.value(item_type, depth + 1) for _ in range(length)]

    def alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        is_power = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
        if not is_power or not 8 <= alignment <= MAX_ALIGNMENT:
            self.fail(f"general.alignment is {alignment!r}")
        return int(alignment)

    def directory(self, num_tensors: int, alignment: int) -> dict[str, TensorEntry]:
        """The tensor directory, offsets made absolute, after checking bounds and overlap."""
        tensors: dict[str, TensorEntry] = {}
        for _ in range(num_tensors):
            name = self.string()
            if name in tensors or len(name) > MAX_NAME_LENGTH or not name.isprintable():
                self.fail(f"the tensor name {name[:80]!r} stands twice, is too long or is not text")
            tensors[name] = self.tensor_entry(name, alignment)
        data_begin = -(-self.position // alignment) * alignment
        end_of_last = data_begin
        for name, entry in sorted(tensors.items(), key=lambda item: item[1].begin):
            begin = data_begin + entry.begin
            if begin < end_of_last:
                self.fail(f"tensor {name} overlaps another")
            end_of_last = begin + entry.num_bytes
            if end_of_last > self.size:
                self.fail(f"tensor {name} runs past the end: the file is truncated")
            tensors[name] = TensorEntry(entry.block_type, entry.shape, begin, entry.num_bytes)
        return tensors

    def tensor_entry(self, name: str, alignment: int) -> TensorEntry:
        num_dims = self.scalar(4)
        if not 1 <= num_dims <= MAX_DIMS:
            self.fail(f"tensor {name} has {num_dims} dimensions")
        shape = tuple(self.scalar(10) for _ in range(num_dims))[::-1]
        type_id, offset = self.scalar(4), self.scalar(10)
        if type_id not in BLOCK_TYPES:
            raise ModelFileError(
                f"{self.path}: tensor {name} is stored as {REFUSED_TYPE_NAMES.get(type_id, f'ggml type {type_id}')}, "
                f"which is not supported; the types that are: {', '.join(t.name for t in BLOCK_TYPES.values())}"
            )
        block_type = BLOCK_TYPES[type_id]
        if 0 in shape or shape[-1] % block_type.num_weights:
            self.fail(f"tensor {name} of type {block_type.name} has the impossible shape {shape}")
        if offset % alignment:
            self.fail(f"tensor {name} is not aligned to {alignment} bytes")
        num_bytes = math.prod(shape) // block_type.num_weights * block_type.num_bytes
        if num_bytes > self.size:
            self.fail(f"tensor {name} of shape {shape} is larger than the file")
        return TensorEntry(block_type, shape, offset, num_bytes)


GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hugging_face_names(path: Path, tensors: dict[str, TensorEntry]) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every weight. `rope_freqs.weight` is not one: it is part of the config."""
    names: dict[str, str] = {}
    for gguf_name in tensors:
        if gguf_name == "rope_freqs.weight":
            continue
        stem, _, kind = gguf_name.rpartition(".")
        layer = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(\w+)", stem, re.ASCII)
        if kind in ("weight", "bias") and layer and layer[2] in LAYER_NAMES:
            names[f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{kind}"] = gguf_name
        elif kind in ("weight", "bias") and stem in GLOBAL_NAMES:
            names[f"{GLOBAL_NAMES[stem]}.{kind}"] = gguf_name
        else:
            raise ModelFileError(f"{path}: tensor {gguf_name[:80]!r} belongs to no model family that can be run")
    return names
