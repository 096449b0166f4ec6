"""Powertrain: end-to-end LLM inference optimization, from weights to streamed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powertrain.compress import compress
    from powertrain.config import EngineConfig
    from powertrain.llm import LLM, AsyncLLM, RequestOutput
    from powertrain.measure.evaluate import evaluate
    from powertrain.optimize import optimize
    from powertrain.types import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "compress",
    "evaluate",
    "optimize",
]

_HOME = {
    "LLM": "powertrain.llm",
    "AsyncLLM": "powertrain.llm",
    "RequestOutput": "powertrain.llm",
    "EngineConfig": "powertrain.config",
    "SamplingParams": "powertrain.types",
    "compress": "powertrain.compress",
    "evaluate": "powertrain.measure.evaluate",
    "optimize": "powertrain.optimize",
}


def __getattr__(name: str) -> Any:
    # Importing the package stays light (no torch): each public name loads its module at first use.
    if name not in _HOME:
        raise AttributeError(f"module 'powertrain' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
