"""Writes GPTQ and AWQ tensors from the formats' descriptions, with numpy alone, and tiny quantized model folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import iterate, open_checkpoint
from powertrain.types import ModelFileError

Array = npt.NDArray[Any]
Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Codes(NamedTuple):
    """Unsigned integers [out, in], zeros and float16 scales [out, groups], and the group of each input."""

    codes: Array
    zeros: Array
    scale: Array
    group_of: Array
    bits: int

    def meaning(self) -> torch.Tensor:
        """The matrix float32 [out, in]."""
        scale = self.scale.astype(np.float32)[:, self.group_of]
        return torch.from_numpy((self.codes - self.zeros[:, self.group_of]).astype(np.float32) * scale)


def random_codes(
    rows: int, columns: int, group_size: int | None, bits: int, seed: int = 0, *, is_scattered: bool = False
) -> Codes:
    """Scales have four significant bits, so that products with a zero point are exact in bfloat16 too."""
    rng = np.random.default_rng(seed)
    groups = columns // (group_size or columns)
    group_of = np.arange(columns) // (group_size or columns)
    return Codes(
        codes=rng.integers(0, 2**bits, (rows, columns)),
        zeros=rng.integers(0, 2**bits, (rows, groups)),
        scale=(rng.integers(8, 16, (rows, groups)) / 2.0 ** (bits + 4)).astype(np.float16),
        group_of=rng.permutation(group_of) if is_scattered else group_of,
        bits=bits,
    )


def pack_words(values: Array, bits: int) -> npt.NDArray[np.uint32]:
    """Unsigned [n, m] -> [n, ceil(m * bits / 32)], the first value in the lowest bits of a word.

    3 bits as GPTQ's writers put it: three words hold 10 values, one over the border, 10, one over the border, and 10.
    """
    if bits == 3:
        v = np.pad(values.astype(np.uint64), ((0, 0), (0, -values.shape[1] % 32))).reshape(len(values), -1, 32)
        at = 3 * np.arange(10, dtype=np.uint64)
        words = (
            (v[..., :10] << at).sum(-1) | (v[..., 10] & 3) << np.uint64(30),
            v[..., 10] >> np.uint64(2)
            | (v[..., 11:21] << at + np.uint64(1)).sum(-1)
            | (v[..., 21] & 1) << np.uint64(31),
            v[..., 21] >> np.uint64(1) | (v[..., 22:] << at + np.uint64(2)).sum(-1),
        )
        return np.stack(words, axis=-1).astype(np.uint32).reshape(len(values), -1)[:, : -(-values.shape[1] * 3 // 32)]
    per_word = 32 // bits
    padded = np.pad(values.astype(np.uint64), ((0, 0), (0, -values.shape[1] % per_word)))
    words = padded.reshape(len(values), -1, per_word)
    return (words << np.arange(0, 32, bits, dtype=np.uint64)).sum(-1).astype(np.uint32)


def as_tensor(words: npt.NDArray[np.uint32]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


def gptq_tensors(made: Codes, version: int = 1) -> Tensors:
    """Version 1 writes each zero minus one, taken from the whole word as GPTQModel does; of 3 bits from each alone."""
    zeros = pack_words(made.zeros.T - (version == 1 and made.bits == 3), made.bits)
    if version == 1 and made.bits != 3:
        zeros = zeros - np.uint32(sum(1 << bit for bit in range(0, 32, made.bits)))
    return {
        "qweight": as_tensor(pack_words(made.codes, made.bits).T),
        "qzeros": as_tensor(zeros),
        "scales": torch.from_numpy(made.scale.T.copy()),
        "g_idx": torch.from_numpy(made.group_of.astype(np.int32)),
    }


def awq_tensors(made: Codes) -> Tensors:
    def pack(values: Array) -> torch.Tensor:
        padded = np.pad(values, ((0, 0), (0, -values.shape[1] % 8)))
        return as_tensor(pack_words(padded.reshape(len(values), -1, 8)[:, :, AWQ_ORDER].reshape(padded.shape), 4))

    scales = torch.from_numpy(made.scale.T.copy())
    return {"qweight": pack(made.codes.T), "qzeros": pack(made.zeros.T), "scales": scales}


class InMemory:
    """As much of a checkpoint as the readers ask for."""

    def __init__(self, tensors: Tensors, quantization: dict[str, Any] | None = None) -> None:
        self.path = Path("somewhere")
        self.config: dict[str, Any] = {"quantization_config": quantization}
        self.generation_config: dict[str, Any] = {}
        self.tensors = tensors

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def load(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ModelFileError(f"there is no tensor named {name}")
        return tuple(self.tensors[name].shape)

    def nbytes(self, name: str) -> int:
        return self.tensors[name].nbytes


def named(layer: str, tensors: Tensors) -> Tensors:
    return {f"{layer}.{suffix}": tensor for suffix, tensor in tensors.items()}


Quantize = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
"""(layer, its weight) -> (its tensors by suffix, the matrix they mean)."""


def write_pair(
    source: Path, out: Path, quantization: dict[str, Any], quantize: Quantize, kept: tuple[str, ...] = ("lm_head",)
) -> tuple[Path, Path]:
    """The model of `source` with its linear layers quantized, and the same model with dense weights that mean it.

    Layers whose names hold one of `kept` stay as they are.
    """
    checkpoint = open_checkpoint(source)
    quantized: Tensors = {}
    dense: Tensors = {}
    for name, tensor in iterate(checkpoint):
        layer = name.removesuffix(".weight")
        is_linear = name.endswith("_proj.weight") or name == "lm_head.weight"
        if not is_linear or any(part in layer for part in kept):
            quantized[name] = dense[name] = tensor
            continue
        tensors, dense[name] = quantize(layer, tensor)
        quantized |= named(layer, tensors)
    config = checkpoint.config | {"quantization_config": quantization}
    write_checkpoint(out / "quantized", config, quantized.items())
    write_checkpoint(out / "dense", checkpoint.config, dense.items())
    return out / "quantized", out / "dense"
