"""What every kind of checkpoint offers: a Hugging Face style config and named tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from powertrain.types import ModelFileError

if TYPE_CHECKING:
    import torch


class Checkpoint(Protocol):
    """A model on disk, in Hugging Face names whatever the file format.

    `config` holds the keys of a Hugging Face `config.json` (GGUF metadata is translated to it);
    `generation_config` those of `generation_config.json`, maybe empty. Memory-mapped: nothing is read before `load`.
    """

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def names(self) -> list[str]:
        """All tensor names, in Hugging Face spelling (`model.layers.0.self_attn.q_proj.weight`)."""
        ...

    def load(self, name: str) -> torch.Tensor:
        """One tensor. Safetensors: dtype as stored. GGUF: dequantized to float32, q/k rows in Hugging Face order.

        Raises `ModelFileError` naming file and tensor if it is absent or damaged.
        """
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape as `load` gives it, from the file's header."""
        ...

    def nbytes(self, name: str) -> int:
        """Bytes the tensor takes on disk."""
        ...


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a `.gguf` file, a `.safetensors` folder, or a folder holding one `.gguf` file.

    Raises `ModelFileError` if there is nothing loadable there (pickled weights are refused by name).
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        from powertrain.checkpoint.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").exists():
            if len(ggufs) > 1:
                raise ModelFileError(f"{path}: {len(ggufs)} .gguf files: give the path of one, such as {ggufs[0].name}")
            from powertrain.checkpoint.gguf import GGUFCheckpoint

            return GGUFCheckpoint(ggufs[0])
        from powertrain.checkpoint.safetensors_folder import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    if path.exists():
        raise ModelFileError(f"{path}: not a .gguf file; for safetensors give the folder that holds config.json")
    raise ModelFileError(f"{path}: no such model file or folder; `powertrain pull smollm2` fetches the default model")


def load_checked(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """One tensor of this shape, which is checked before it is loaded, and dtype; None is any float of 16 bits or more.

    Raises `ModelFileError` naming the tensor that is missing or differs.
    """
    expected = f"{'float' if dtype is None else str(dtype).removeprefix('torch.')} {list(shape)}"
    found = tuple(checkpoint.shape(name))
    if found != shape:
        raise ModelFileError(f"{checkpoint.path}: {name} has shape {list(found)}, expected {expected}")
    tensor = checkpoint.load(name)
    is_wide_float = tensor.is_floating_point() and tensor.element_size() >= 2
    if not (is_wide_float if dtype is None else tensor.dtype == dtype):
        raise ModelFileError(f"{checkpoint.path}: {name} is {tensor.dtype} {list(found)}, expected {expected}")
    return tensor


def iterate(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint in name order, one in memory at a time."""
    for name in checkpoint.names():
        yield name, checkpoint.load(name)
