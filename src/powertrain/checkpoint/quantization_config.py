"""What the readers of quantized checkpoints share: the fields of `quantization_config` and refusals by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from powertrain.types import ModelFileError

HEAD = "lm_head"
DEFAULT_GROUP_SIZE = 128  # what GPTQ's and AWQ's own tools take where a config does not say


def refuse(problem: str) -> NoReturn:
    raise ModelFileError(f"config.json: quantization_config: {problem}")


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a model's `config.json`, or None. Raises `ModelFileError` if it is no mapping."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization is not None and not isinstance(quantization, dict):
        refuse(f"is a {type(quantization).__name__}, expected a mapping")
    return quantization


def group_size_of(quantization: Mapping[str, Any]) -> int | None:
    """`group_size` as a number of inputs; None for -1, one group a row."""
    size = quantization.get("group_size", DEFAULT_GROUP_SIZE)
    if type(size) is not int or (size < 1 and size != -1):
        refuse(f"group_size {size!r} is neither a size nor -1")
    return None if size == -1 else size


def flag_of(quantization: Mapping[str, Any], key: str, default: bool) -> bool:
    """A switch; `default` where it is absent or null."""
    value = quantization.get(key)
    if value is not None and not isinstance(value, bool):
        refuse(f"{key} is {value!r}, expected true or false")
    return default if value is None else value


def names_of(quantization: Mapping[str, Any], key: str) -> list[str]:
    """A list of module names, maybe empty or absent."""
    names = quantization.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        refuse(f"{key} is not a list of names")
    return names


def refuse_overrides(quantization: Mapping[str, Any], *keys: str) -> None:
    """Raises `ModelFileError` for settings that treat some modules apart from the others."""
    for key in keys:
        if quantization.get(key):
            refuse(f"{key}: layers quantized apart from the others cannot be run; use a checkpoint without it")


def num_groups(layer: str, in_features: int, group_size: int | None) -> int:
    """Groups of a row. Raises `ModelFileError` naming the layer where they are not whole."""
    size = group_size or in_features
    if in_features % size:
        refuse(f"group_size {size} does not divide the {in_features} inputs of {layer}")
    return in_features // size
