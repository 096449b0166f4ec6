from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from powertrain.measure import bench, roofline
from powertrain.measure.roofline import Ceilings
from powertrain.types import PowertrainError

ROW = {"batch", "prompt", "output", "prefill_s", "step_ms", "output_tokens_per_s", "floor_ms", "fraction"}
TOP = {"schema", "kind", "model", "format", "kv_cache_dtype", "device", "software", "git", "config", "results", "mixed"}


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> Ceilings:
    """Measuring the machine takes a second and its own tests."""
    ceilings = Ceilings(1e9, 1e10, "cpu", "float32", 1)
    monkeypatch.setattr(roofline, "measure_ceilings", lambda device, threads=None: ceilings)
    return ceilings


@pytest.fixture
def bare_config(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder with only a `config.json`."""
    (tmp_path / "config.json").write_bytes((tiny_model_dir("llama") / "config.json").read_bytes())
    return tmp_path


def test_the_record_has_the_published_shape(known_ceilings: Ceilings, tiny_model_dir: Callable[[str], Path]) -> None:
    made = bench.bench_engine(
        tiny_model_dir("llama"), batches=[1, 3], prompt=20, output=5, threads=1, device="cpu", git="abc"
    )
    assert json.loads(json.dumps(made, allow_nan=False))
    assert set(made) >= TOP | {"startup_s"}
    assert made["schema"] == 1
    assert made["kind"] == "engine"
    assert made["git"]["commit"] == "abc"
    assert made["mixed"] is None
    assert made["config"]["cache"]["enable_prefix_caching"] is False
    assert [row["batch"] for row in made["results"]] == [1, 3]
    for row in made["results"]:
        assert set(row) >= ROW
        assert row["output_tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["step_ms"])
        assert row["fraction"] == pytest.approx(row["floor_ms"] / row["step_ms"])
        assert row["prefill_s"] > 0


@pytest.mark.parametrize("weights", bench.FORMATS)
def test_random_weights_need_only_a_config(known_ceilings: Ceilings, bare_config: Path, weights: bench.Format) -> None:
    made = bench.bench_engine(
        bare_config, random_weights=True, format=weights, batches=[2], prompt=8, output=3, device="cpu", threads=1
    )
    assert made["format"] == weights
    assert len(made["results"]) == 1


def test_every_request_gets_exactly_its_tokens(known_ceilings: Ceilings, tiny_model_dir: Callable[[str], Path]) -> None:
    """Counted by the engine itself, apart from the benchmark's own count."""
    engine, _ = bench.start_engine(
        tiny_model_dir("llama"),
        bench._engine_config(bench.Workload(batches=(3,), prompt=20, output=5), "cpu", "auto", 1, {}),
        False,
        "none",
    )
    sampling = bench.SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    prompts = bench.random_prompts(3, 20, engine.info.vocab_size, bench.random.Random(0))
    before = engine.stats().generation_tokens
    bench.timed_run(engine, prompts, [sampling] * 3)
    assert engine.stats().generation_tokens - before == 15
    assert engine.stats().num_preemptions == 0
    assert engine.stats().prefix_cache_hits == 0
    assert engine.stats().num_blocks_in_use == 0


def test_mixed_lengths_are_counted(
    known_ceilings: Ceilings, tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "MIXED_LENGTHS", (3, 12))
    made = bench.bench_engine(
        tiny_model_dir("llama"), batches=[1], prompt=8, output=2, mixed=6, device="cpu", threads=1, seed=3
    )
    mixed = made["mixed"]
    assert mixed["num_requests"] == 6
    assert 6 * 3 <= mixed["output_tokens"] <= 6 * 12
    assert mixed["output_tokens_per_s"] == pytest.approx(mixed["output_tokens"] / mixed["seconds"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"format": "int4"}, "--random-weights"),
        ({"format": "fp7", "random_weights": True}, "--format"),
        ({"batches": [0]}, "--batch"),
        ({"batches": []}, "--batch"),
        ({"prompt": 0}, "--prompt"),
        ({"prompt": 10**6, "batches": [1]}, "exceeds"),
    ],
)
def test_impossible_workloads_are_refused(
    known_ceilings: Ceilings, tiny_model_dir: Callable[[str], Path], arguments: dict[str, object], named: str
) -> None:
    with pytest.raises(PowertrainError, match=named):
        bench.bench_engine(tiny_model_dir("llama"), device="cpu", **arguments)  # type: ignore[arg-type]


def test_prompts_are_repeatable_and_inside_the_vocabulary() -> None:
    first = bench.random_prompts(2, 50, 64, bench.random.Random(7))
    assert first == bench.random_prompts(2, 50, 64, bench.random.Random(7))
    assert first != bench.random_prompts(2, 50, 64, bench.random.Random(8))
    assert all(10 <= token < 54 for prompt in first for token in prompt)


def test_peak_memory_is_of_this_process_not_of_its_parent() -> None:
    ballast = bytearray(os.urandom(1)) * (700 * 2**20)
    assert bench.peak_memory_bytes("cpu") > len(ballast)
    code = "from powertrain.measure.bench import peak_memory_bytes; print(peak_memory_bytes('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert 10 * 2**20 < int(done.stdout) < 600 * 2**20
    del ballast


def test_it_runs_as_a_module_without_the_cli(bare_config: Path, tmp_path: Path) -> None:
    """In a process where importing the command line's libraries fails, as on a bare compute machine."""
    out = tmp_path / "out.json"
    blocked = ("rich", "typer", "pydantic", "msgspec", "yaml", "jinja2", "huggingface_hub", "fastapi", "zmq")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from powertrain.measure import bench, roofline\n"
        "roofline._CPU_BUFFER_BYTES = 2**23\n"
        "bench.main()"
    )
    arguments = [
        bare_config,
        "--random-weights",
        "--format",
        "int8",
        "--batch",
        "1,2",
        "--prompt",
        "8",
        "--output",
        "2",
    ]
    arguments += ["--threads", "1", "--device", "cpu", "--json", out, "--git", "c0ffee"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(out.read_text())
    assert made["git"]["commit"] == "c0ffee"
    assert [row["batch"] for row in made["results"]] == [1, 2]
    assert "of floor" in done.stdout
