"""The native CPU kernels: find the compiled module `_native`, or say in one line why there is none.

The module is optional: it is built by `pip install` where a C++20 compiler is, and everything runs without it, on the
torch reference of each op. Its sources are in `native/`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from powertrain.config import native_module_path
from powertrain.types import PowertrainError

_NAME = "powertrain.kernels._native"


def load() -> ModuleType | None:
    """The module; None where `unavailable` says why.

    $POWERTRAIN_NATIVE names another build of it. Who asks for one must not get the reference path instead, so one that
    does not load raises `PowertrainError`.
    """
    try:
        return _import()
    except ImportError:
        return None


def unavailable() -> str | None:
    """Why there is no native module, in one line; None when there is one."""
    try:
        _import()
    except ModuleNotFoundError as error:
        return _why_not_built() if error.name == _NAME else _first_line(error)
    except ImportError as error:  # built, but for a machine with other libraries
        return f"the module does not load: {_first_line(error)}"
    return None


def describe() -> str:
    """For start lines: the instruction set that runs, or why none does."""
    module = load()
    if module is None:
        return f"native kernels: none ({unavailable()}); the reference path runs"
    return f"native kernels: {module.levels()[0]}"


def _import() -> ModuleType:
    if _NAME not in sys.modules and (path := native_module_path()) is not None:
        return _import_file(path)
    return importlib.import_module(_NAME)


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if spec is None or spec.loader is None:
        raise PowertrainError(f"POWERTRAIN_NATIVE: {path} is not a Python extension module")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise PowertrainError(f"POWERTRAIN_NATIVE: {path} does not load: {_first_line(error)}") from error
    sys.modules[_NAME] = module
    return module


def _why_not_built() -> str:
    try:
        wheel = metadata.distribution("powertrain").read_text("WHEEL") or ""
    except metadata.PackageNotFoundError:
        return "not built: powertrain runs from a source tree that was not installed"
    if "Root-Is-Purelib: true" in wheel:
        return "not built: powertrain was installed without a working C++20 compiler; pip install -v tells more"
    return "not built for this source tree or this Python: install powertrain from it"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
