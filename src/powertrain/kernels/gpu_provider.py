"""The Triton kernels as providers of the ops: where triton is installed, for tensors on a CUDA device.

Triton is imported when the first of them runs, so that a CPU's start does not pay for it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch

from powertrain.kernels.op import Mode, Provider

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def triton_provider(
    module: str,
    function: str,
    refuses: Callable[..., str | None] | None = None,
    modes: tuple[Mode, ...] = ("fast",),
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> Provider[Any, Any]:
    """`powertrain.kernels.gpu.<module>.<function>`, which takes the op's own arguments, a tensor first.

    `refuses` gives the reason why it does not take some that are on a CUDA device and of `dtypes`.
    """

    def run(*args: Any) -> Any:
        return getattr(import_module(f"powertrain.kernels.gpu.{module}"), function)(*args)

    def accepts(*args: Any) -> str | None:
        return _refuse(args[0], dtypes) or (refuses(*args) if refuses is not None else None)

    return Provider("triton", run, accepts, unsupported, modes)


def invariant_provider(function: str, refuses: Callable[..., str | None] | None = None) -> Provider[Any, Any]:
    """`powertrain.kernels.gpu.invariant.<function>`."""
    return triton_provider("invariant", function, refuses, ("invariant",))


BY_ROW: tuple[Mode, ...] = ("fast", "invariant")
"""Modes of a kernel that computes each row by itself in one way."""


def unsupported() -> str | None:
    """Why there are no Triton kernels, in one line; None where there are."""
    return None if find_spec("triton") is not None else "triton is not installed"


def _refuse(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if x.device.type != "cuda":
        return "the tensors are not on a CUDA device"
    return None if x.dtype in dtypes else f"no kernel for {x.dtype}"


def refuse_gaps(*args: Any) -> str | None:
    """For kernels that take each row to follow the one before it."""
    has_gaps = any(isinstance(arg, torch.Tensor) and not arg.is_contiguous() for arg in args)
    return "rows are not contiguous" if has_gaps else None


def describe() -> str:
    """For start lines: Triton's version, or why the reference path runs."""
    reason = unsupported()
    if reason is not None:
        return f"reference kernels ({reason})"
    return f"Triton {metadata.version('triton')} kernels"
