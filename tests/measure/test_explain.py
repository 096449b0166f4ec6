"""`powertrain explain`: what it records of a model's steps, what it tells people, and what it advises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from powertrain import cli
from powertrain.config import EngineConfig
from powertrain.kernels import native
from powertrain.measure import explain as measure
from powertrain.measure.explain import explain, text
from powertrain.types import PowertrainError

FOLDER = Callable[[str], Path]
PHASES = ["prefill", "decode 1", "decode 8", "decode 64"]
OPS = {"rms_norm", "add_rms_norm", "apply_rope", "rotate_and_write", "write_kv", "paged_attention", "silu_mul"}
needs_native = pytest.mark.skipif(native.load() is None, reason="no native kernels here")


def config_of(**options: Any) -> EngineConfig:
    return EngineConfig.from_options(**{"device": "cpu", "threads": 1, "num_blocks": 100, **options})


def ops_of(made: dict[str, Any], phase: str) -> dict[str, dict[str, Any]]:
    (found,) = [entry["ops"] for entry in made["phases"] if entry["phase"] == phase]
    return {f"{op['op']} {op['provider']}": op for op in found}


def test_every_op_of_the_reference_is_in_every_phase(tiny_model_dir: FOLDER) -> None:
    made = explain(tiny_model_dir("llama"), config_of(kernels="reference"))
    assert json.loads(json.dumps(made, allow_nan=False))["kind"] == "explain"
    assert [entry["phase"] for entry in made["phases"]] == PHASES
    for entry in made["phases"]:
        assert {op["op"] for op in entry["ops"]} == OPS
        assert {op["provider"] for op in entry["ops"]} == {"reference"}
        norm = next(op for op in entry["ops"] if op["op"] == "rms_norm")
        assert any(reason.startswith("triton: ") for reason in norm["refusals"])
    hidden = ops_of(made, "decode 8")["rms_norm reference"]["shapes"][0]
    assert hidden.startswith("8x")
    assert hidden.endswith(" float32")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_torchs_integer_products_stop_where_there_are_many_rows(tiny_model_dir: FOLDER, weights: Any) -> None:
    config = config_of(kernels="reference")
    made = explain(tiny_model_dir("llama"), config, random_weights=True, format=weights)
    few, many = ops_of(made, "decode 64"), ops_of(made, "prefill")
    assert f"{weights}_linear torch" in few
    assert f"{weights}_linear reference" not in few
    assert "torch: 128 rows: dequantizing once is faster above 64" in many[f"{weights}_linear reference"]["refusals"]
    assert made["formats"][weights] > 1


def test_steps_are_bounded_by_the_pool_and_the_slots(tiny_model_dir: FOLDER) -> None:
    made = explain(tiny_model_dir("qwen3"), config_of(kernels="reference", num_blocks=5))
    assert [entry["phase"] for entry in made["phases"]] == ["prefill", "decode 1", "decode 5"]
    assert ops_of(made, "prefill")["silu_mul reference"]["shapes"][0].startswith("80x")
    made = explain(tiny_model_dir("qwen3"), config_of(kernels="reference", max_num_seqs=1, max_model_len=2))
    assert [entry["phase"] for entry in made["phases"]] == ["prefill", "decode 1"]


def test_the_table_fits_100_columns_and_says_why(tiny_model_dir: FOLDER) -> None:
    made = explain(tiny_model_dir("llama"), config_of(kernels="reference"), random_weights=True, format="int8")
    lines = text(made).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line in PHASES] == PHASES
    (row,) = [line for line in lines[: lines.index("decode 1")] if line.startswith("  int8_linear")]
    assert "reference" in row
    assert any(line.startswith("weights: 8 x int8, 1 x float32") and "KV cache: float32" in line for line in lines)
    assert any("torch's own on a CPU" in line for line in lines)


@needs_native
def test_the_native_kernels_say_that_a_step_is_one_call(tiny_model_dir: FOLDER) -> None:
    made = explain(tiny_model_dir("llama"), config_of())
    assert [entry["ops"] for entry in made["phases"]] == [[], [], [], []]
    shown = text(made)
    assert native.describe() in shown
    assert "a step is one call of the native module" in shown
    assert "Q4_0" in shown
    assert "KV cache: float16" in shown
    assert "faster:" not in shown
    assert "provider" not in shown


@needs_native
@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"kernels": "reference"}, "leave --kernels out: "),
        ({"dtype": "float32"}, "leave --dtype out: "),
        ({"kernels": "reference", "dtype": "bfloat16"}, "leave --kernels out and leave --dtype out: "),
        ({"block_size": 8}, "make --block-size a multiple of 16: "),
    ],
)
def test_the_advice_makes_the_native_kernels_run(tiny_model_dir: FOLDER, options: dict[str, Any], change: str) -> None:
    made = explain(tiny_model_dir("llama"), config_of(**options))
    assert made["advice"].startswith(change)
    assert f"faster: {change}" in text(made)


def test_the_advice_without_native_kernels_is_how_to_get_them(
    tiny_model_dir: FOLDER, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(native, "unavailable", lambda: "not built: reasons")
    assert explain(tiny_model_dir("llama"), config_of())["advice"] == "no native kernels: not built: reasons"


def test_the_advice_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: FOLDER) -> None:
    from powertrain.checkpoint.load import random_model

    model = random_model(tiny_model_dir("llama"), "cpu", torch.float32, "int4")
    monkeypatch.setattr("powertrain.kernels.gpu_provider.unsupported", lambda: "triton is not installed")
    assert measure._gpu_advice(model) == "triton is not installed: install it for the Triton kernels"
    monkeypatch.setattr("powertrain.kernels.gpu_provider.unsupported", lambda: None)
    assert "leave --kernels out" in str(measure._gpu_advice(model))
    model.kernels = "triton"
    assert "--group-size" in str(measure._gpu_advice(model))


def test_the_verb_prints_the_table_and_writes_the_record(
    tiny_model_dir: FOLDER, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_dir("llama") / "config.json").read_bytes())
    flags = ["--random-weights", "--format", "int4", "--kernels", "reference", "--device", "cpu"]
    monkeypatch.setattr(
        sys, "argv", ["powertrain", "explain", str(tmp_path), *flags, "--json", str(tmp_path / "made.json")]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "int4_linear" in capsys.readouterr().out
    made = json.loads((tmp_path / "made.json").read_text())
    assert {"model", "runs_on", "dtype", "kernels", "phases", "notes", "formats", "kv_cache_dtype"} <= set(made)


def test_an_unknown_model_or_a_format_of_real_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PowertrainError, match="nowhere"):
        explain(str(tmp_path / "nowhere"), config_of())
    with pytest.raises(PowertrainError, match="--format goes with --random-weights"):
        explain(str(tmp_path), config_of(), format="int4")


def test_it_runs_on_a_bare_machine(tiny_model_dir: FOLDER) -> None:
    code = """
import sys
for name in ("fastapi", "pydantic", "gguf", "typer", "rich", "msgspec", "zmq"):
    sys.modules[name] = None
from powertrain.config import EngineConfig
from powertrain.measure.explain import explain, text
print(text(explain(sys.argv[1], EngineConfig(device="cpu", kernels="reference"), random_weights=True)))
"""
    command = [sys.executable, "-c", code, str(tiny_model_dir("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "paged_attention" in done.stdout
