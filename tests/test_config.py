"""Settings: what `resolve` settles and refuses, and how the cores of a machine are counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from powertrain.config import EngineConfig, count_cores, cpu_quota, physical_cores, resolve
from powertrain.types import PowertrainError


def settle(has_cuda: bool = False, model_dtype: str = "bfloat16", **options: Any) -> EngineConfig:
    return resolve(EngineConfig.from_options(**options), has_cuda=has_cuda, model_dtype=model_dtype)


@pytest.mark.parametrize(
    ("options", "has_cuda", "settled"),
    [
        ({}, False, ("cpu", "float32", "auto")),
        ({"dtype": "float32"}, False, ("cpu", "float32", "reference")),
        ({"dtype": "bfloat16"}, False, ("cpu", "bfloat16", "reference")),
        ({"kernels": "native"}, False, ("cpu", "float32", "native")),
        ({"kernels": "native", "dtype": "float32"}, False, ("cpu", "float32", "native")),
        ({"kernels": "reference"}, False, ("cpu", "float32", "reference")),
        ({}, True, ("cuda", "bfloat16", "triton")),
        ({"kernels": "triton"}, True, ("cuda", "bfloat16", "triton")),
        ({"kernels": "reference"}, True, ("cuda", "bfloat16", "reference")),
        ({"device": "cpu"}, True, ("cpu", "float32", "auto")),
        ({"device": "cpu", "kernels": "native"}, True, ("cpu", "float32", "native")),
    ],
)
def test_device_dtype_and_kernels(options: dict[str, Any], has_cuda: bool, settled: tuple[str, str, str]) -> None:
    config = settle(has_cuda, **options)
    assert (config.device, config.dtype, config.kernels) == settled


@pytest.mark.parametrize(
    ("options", "has_cuda", "says"),
    [
        ({"device": "cuda"}, False, "--device cpu"),
        ({"kernels": "native"}, True, "add --device cpu"),
        ({"kernels": "triton"}, False, "--kernels triton runs on a GPU"),
        ({"kernels": "native", "dtype": "bfloat16"}, False, "--dtype bfloat16 goes with --kernels reference"),
        ({"kernels": "native", "block_size": 24}, False, "block_size must be a multiple of 16"),
        ({"kv_cache_dtype": "fp8"}, False, "int8 is as small and runs here"),
        ({"kernels": "native", "kv_cache_dtype": "fp8"}, False, "or with --kernels reference"),
        ({"kernels": "reference", "deterministic": True}, False, "--deterministic needs the native kernels"),
        ({"dtype": "float32", "deterministic": True}, False, "--deterministic needs the native kernels"),
        ({"kernels": "fast"}, False, "kernels must be one of auto, native, triton, reference"),
        ({"kv_cache_dtype": "int3"}, False, "kv_cache_dtype must be one of auto, float32, float16, int8, fp8, int4"),
        ({"threads": 0}, False, "threads must be at least 1"),
        ({"gpu_memory_utilization": 1.5}, False, "gpu_memory_utilization must be in"),
    ],
)
def test_what_cannot_run_is_refused_by_name(options: dict[str, Any], has_cuda: bool, says: str) -> None:
    with pytest.raises(PowertrainError, match=says):
        settle(has_cuda, **options)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "float32", "float16", "int8"])
def test_native_kernels_take_every_cache_type(kv_cache_dtype: str) -> None:
    config = settle(kernels="native", kv_cache_dtype=kv_cache_dtype, block_size=32)
    assert config.cache.kv_cache_dtype == kv_cache_dtype


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_8_bit_caches_run_on_a_gpu_and_on_the_reference(kv_cache_dtype: str) -> None:
    assert settle(True, kv_cache_dtype=kv_cache_dtype).cache.kv_cache_dtype == kv_cache_dtype
    assert settle(kernels="reference", kv_cache_dtype=kv_cache_dtype).cache.kv_cache_dtype == kv_cache_dtype


def test_threads_are_the_physical_cores_unless_given() -> None:
    assert settle().threads == physical_cores()
    assert settle(threads=7).threads == 7
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def topology(system: Path, name: str, *siblings: str) -> Path:
    """CPU files as Linux has them, one list of siblings per CPU."""
    for cpu, listed in enumerate(siblings):
        folder = system / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / name).write_text(f"{listed}\n")
    return system


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_hyper_threads_of_one_core_count_once(tmp_path: Path, name: str) -> None:
    system = topology(tmp_path, name, "0,4", "1,5", "2-3", "2-3", "0,4", "1,5")
    assert count_cores({0, 1, 2, 3, 4, 5}, system) == 3
    assert count_cores({0, 4}, system) == 1
    assert count_cores({1, 2}, system) == 2


def test_cpus_without_topology_are_cores(tmp_path: Path) -> None:
    assert count_cores({0, 1, 9}, tmp_path) == 3


def test_the_tightest_quota_above_a_process_holds(tmp_path: Path) -> None:
    inner = tmp_path / "cgroups" / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    (inner.parents[1] / "cpu.max").write_text("400000 100000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    assert cpu_quota(inner.parents[1], membership) == 2.5
    membership.write_text("0::/elsewhere\n")
    assert cpu_quota(inner.parents[1], membership) == 4.0


def test_the_older_cgroups_have_their_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "cpu"
    (folder / "a").mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpu,cpuacct:/a\n1:memory:/\n0::/\n")
    assert cpu_quota(tmp_path, membership) is None
    (folder / "a" / "cpu.cfs_quota_us").write_text("150000\n")
    (folder / "a" / "cpu.cfs_period_us").write_text("50000\n")
    assert cpu_quota(tmp_path, membership) == 3.0
    assert cpu_quota(tmp_path / "nothing", tmp_path / "nothing") is None
