"""Kernels compiled by other processes are those that the launches would have compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from powertrain.kernels.gpu import compile_ahead, fused, launch

TARGET = GPUTarget("cuda", 90, 32)


class NoDevice:
    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


driver.set_active(NoDevice())
fused.launch_options = lambda x, is_late=False: {"PDL": 2 if is_late else 1, "launch_pdl": True}


def launches():
    with compile_ahead.collected() as kernels:
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.zeros(3, 64, dtype=dtype)
            fused.silu_mul(x)
            fused.rms_norm(x, x[0], 1e-5)
            for delta in (x, torch.zeros(2, 3, 64)):
                fused.add_rms_norm(x, delta, x[0], 1e-5, True)
                fused.add_rms_norm(x, delta, x[0], 1e-5)
    return kernels


kernels = launches()
assert len(kernels) == len(launches()) == 12, kernels
assert not any(compile_ahead.is_cached(kernel, TARGET) for kernel in kernels)
assert compile_ahead.compile_missing(kernels, TARGET) == 12
assert all(compile_ahead.is_cached(kernel, TARGET) for kernel in kernels)
assert compile_ahead.compile_missing(kernels, TARGET) == 0

wrong = [compile_ahead.Specialized("powertrain.kernels.gpu.fused", "_no_kernel", kernel.data) for kernel in kernels]
compile_ahead.is_cached = lambda kernel, target: False
assert compile_ahead.compile_missing(wrong, TARGET) == 12, "what fails is left to the launches"

# a launch compiles the same: Triton finds all in its cache and begins none
import triton

compiled = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: compiled.append(cache_hit)
launch.launch = fused.launch = lambda kernel, grid: lambda *args, **options: kernel.warmup(*args, grid=grid, **options)
x = torch.zeros(3, 64, dtype=torch.float16)
fused.silu_mul(x)
fused.add_rms_norm(x, torch.zeros(2, 3, 64), x[0], 1e-5, True)
assert compiled == [True, True], compiled
"""


def test_other_processes_leave_what_launches_find(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "_no_kernel" in ran.stderr, "the failure is told"
