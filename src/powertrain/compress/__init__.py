"""Compression: functions on one matrix at a time, and one driver that turns a model into a smaller one on disk.

`powertrain.compress` is both this package and the public function: the module itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from powertrain.compress.driver import compress, plan_compression
from powertrain.compress.recipe import Recipe, Step, load_recipe
from powertrain.compress.report import CompressionReport

__all__ = ["CompressionReport", "Recipe", "Step", "compress", "load_recipe", "plan_compression"]


class _CallableModule(ModuleType):
    # Importing any submodule binds the name `powertrain.compress` to this module, over the public function of the
    # same name; being callable keeps `from powertrain import compress; compress(...)` true in either order.
    def __call__(self, *args: Any, **kwargs: Any) -> CompressionReport:
        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
