"""Optimize: try weight formats and engine settings on this machine, keep what meets the limits, say what it cost.

`powertrain.optimize` is both this package and the public function: the module itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from powertrain.optimize.run import OptimizeResult, optimize
from powertrain.optimize.space import Limits

__all__ = ["Limits", "OptimizeResult", "optimize"]


class _CallableModule(ModuleType):
    # Importing any submodule binds the name `powertrain.optimize` to this module, over the public function of the same
    # name; being callable keeps `from powertrain import optimize; optimize(...)` true in either order.
    def __call__(self, *args: Any, **kwargs: Any) -> OptimizeResult:
        return optimize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
