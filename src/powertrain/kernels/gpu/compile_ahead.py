"""Compile kernels before they run, by as many processes as there are cores: in one, each waits for those before it.

What a step would launch is collected without launching it, what Triton's cache on disk has not is shared out among
workers (`python -m powertrain.kernels.gpu.compile_ahead`), and the first real launch finds it there. A worker that
fails costs nothing but time: its kernels are compiled when they are first used.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager

from powertrain.kernels.gpu.launch import collecting_launches

logger = logging.getLogger(__name__)

FEWEST = 8
"""Kernels that are worth the start of other processes, each of which loads torch and Triton first."""
MOST_WORKERS = 16
SECONDS = 300
"""After which a worker is stopped."""


class Specialized(NamedTuple):
    """A kernel as one launch wants it: where it is defined, and Triton's own description of the rest, JSON."""

    module: str
    name: str
    data: str


@contextmanager
def collected() -> Iterator[dict[Specialized, None]]:
    """The kernels of the launches within, of those that this process has not compiled yet; none of them runs.

    So nothing that they write may be an index of anything else.
    """
    found: dict[Specialized, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found[Specialized(fn.module, fn.name, compile["specialization_data"])] = None
        return True  # which tells Triton not to compile it

    with triton.knobs.runtime.scope(), collecting_launches():
        triton.knobs.runtime.jit_cache_hook = note
        yield found


def compile_missing(kernels: Iterable[Specialized], target: GPUTarget) -> int:
    """Compile what the cache on disk has not, and return how many that were; fewer than `FEWEST` are left."""
    missing = [kernel for kernel in kernels if not is_cached(kernel, target)]
    count = min(os.cpu_count() or 1, MOST_WORKERS, len(missing) // 2)
    if len(missing) < FEWEST or count < 2:
        return 0
    shares = [missing[first::count] for first in range(count)]
    workers = [_start([list(target.__dict__.values()), share]) for share in shares]
    for worker in workers:
        try:
            _, errors = worker.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            _, errors = worker.communicate()
        if worker.returncode:
            logger.warning("a process that compiles kernels failed: %s", errors.strip().rsplit("\n", 1)[-1])
    return len(missing)


def _start(work: list[Any]) -> subprocess.Popen[str]:
    """A worker on its way with its work, which is less than a pipe holds or is read as it comes."""
    command = [sys.executable, "-m", "powertrain.kernels.gpu.compile_ahead"]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True)
    assert worker.stdin is not None
    try:
        json.dump(work, worker.stdin)
        worker.stdin.close()
    except BrokenPipeError:
        pass  # it has failed, which its return code says
    worker.stdin = None
    return worker


def source_of(kernel: Specialized, target: GPUTarget) -> tuple[ASTSource, Any]:
    """What Triton compiles, and its options: the inverse of what it describes, as `JITFunction.preload` reads it."""
    described = json.loads(kernel.data)
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    keys = map(tuple, described["constant_keys"])
    constants = dict(zip(keys, map(_constant, described["constant_vals"]), strict=True))
    attributes = dict(zip(map(tuple, described["attrs_keys"]), described["attrs_vals"], strict=True))
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in described["options"].items()}
    source = ASTSource(function, described["signature"], constants, attributes)
    return source, make_backend(target).parse_options(options)


def _constant(value: Any) -> Any:
    if isinstance(value, dict) and "constexpr" in value:
        return triton.language.constexpr(value["constexpr"])
    return triton.language.dtype(value) if triton.language.dtype.is_dtype(value) else value


def is_cached(kernel: Specialized, target: GPUTarget) -> bool:
    """Whether Triton's cache on disk has it."""
    source, options = source_of(kernel, target)
    invalidating = triton.compiler.compiler.get_cache_invalidating_env_vars()
    key = get_cache_key(source, make_backend(target), options, invalidating)
    manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    name = f"{source.name[:150]}.json"
    return name in (manager.get_group(name) or {})


def main() -> None:
    """Compile what the standard input lists."""
    of_target, kernels = json.load(sys.stdin)
    target = GPUTarget(*of_target)
    for kernel in kernels:
        source, options = source_of(Specialized(*kernel), target)
        triton.compile(source, target=target, options=options.__dict__)


if __name__ == "__main__":
    main()
