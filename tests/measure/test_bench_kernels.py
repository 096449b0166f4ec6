from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from powertrain import cli
from powertrain.kernels import native
from powertrain.kernels.fused import add_rms_norm, silu_mul
from powertrain.kernels.model_cases import MODEL_CASES, MODEL_SHAPES, ModelShape, Workload
from powertrain.kernels.op import Provider
from powertrain.kernels.quantized import Int4Blocks
from powertrain.measure import bench_kernels as measure
from powertrain.measure import roofline
from powertrain.measure.native_cases import NATIVE_OP
from powertrain.measure.roofline import Ceilings
from powertrain.model.families import model_config
from powertrain.types import PowertrainError

ROW = {"name", "op", "label", "ran", "refusals", "error", "tolerance", "is_correct", "failure", "bytes", "gflop", "us"}
ROW |= {"floor_us", "bound", "fraction", "num_copies", "num_calls"}
SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
HAS_NATIVE = native.load() is not None
ON_A_CPU = [name for name in measure.KNOWN_OPS if name != NATIVE_OP or HAS_NATIVE]


@pytest.fixture(autouse=True)
def a_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known ceilings, a model of a few thousand weights, and few copies and calls."""
    ceilings = Ceilings(1e9, 1e10, "cpu", "float32", 1)
    monkeypatch.setattr(roofline, "measure_ceilings", lambda device, threads=None: ceilings)
    monkeypatch.setitem(MODEL_SHAPES, "tiny", ModelShape(64, 96, 4, 2, 16, 160, has_qk_norm=True))
    monkeypatch.setattr(measure, "_COPIES_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(measure, "_BUDGET_S", 1e-3)


def run(**given: Any) -> dict[str, Any]:
    return measure.bench_kernels(device="cpu", shape="tiny", threads=1, **{"rows": (1, 5), **given})


def test_every_op_has_a_right_and_timed_case_at_each_number_of_rows() -> None:
    made = run(git="abc")
    assert json.loads(json.dumps(made, allow_nan=False))["results"] == made["results"]
    assert (made["kind"], made["git"]["commit"], made["config"]["rows"]) == ("kernels", "abc", (1, 5))
    assert list(dict.fromkeys(row["op"] for row in made["results"])) == ON_A_CPU
    for row in made["results"]:
        assert set(row) == ROW
        assert row["is_correct"], row
        assert row["us"] > 0
        assert row["num_copies"] >= 1
        assert row["num_calls"] >= 5
        assert row["fraction"] == pytest.approx(row["floor_us"] / row["us"])
        assert row["floor_us"] >= row["bytes"] / 1e3 * (1 - 1e-9)
    assert measure.num_wrong(made) == 0
    for op in MODEL_CASES:
        labels = [row["label"] for row in made["results"] if row["op"] == op]
        assert any("1x" in label for label in labels)
        assert any("5x" in label for label in labels)
    assert [row["ran"] for row in made["results"] if row["op"] == "int8_linear"] == ["torch"] * 8
    assert "rms_norm: not triton: the tensors are not on a CUDA device (2 of 2)" in measure.explanations(made)


@pytest.mark.parametrize("name", sorted(path.name for path in SHAPES.iterdir()))
def test_the_shapes_are_those_of_the_models(name: str) -> None:
    config = model_config(json.loads((SHAPES / name / "config.json").read_text()))
    shape = MODEL_SHAPES[name]
    assert {field: getattr(config, field) for field in vars(shape)} == vars(shape)
    outputs: dict[str, int] = {}
    linear = config.linear_shapes()
    for part, (out, _) in linear.items():
        outputs[part.split(".")[1]] = out
    work = Workload(shape, torch.float32, (1,))
    assert work.products() == {
        "qkv": (outputs["q_proj"] + outputs["k_proj"] + outputs["v_proj"], config.hidden_size),
        "o": linear["self_attn.o_proj"],
        "gate_up": (outputs["gate_proj"] + outputs["up_proj"], config.hidden_size),
        "down": linear["mlp.down_proj"],
        "head": (config.vocab_size, config.hidden_size),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", MODEL_CASES)
def test_cases_count_the_bytes_of_their_arguments_and_results(op: str, dtype: torch.dtype) -> None:
    """Each once; what attention and the cache write hold besides, and the second layout of 4 bits, they do not read."""
    for case in MODEL_CASES[op](Workload(MODEL_SHAPES["tiny"], dtype, (3,), context=32, chunk=32)):
        args = case.make(torch.Generator().manual_seed(0))
        if op == "int4_linear":
            args = args[:1] + args[2:]
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        tensors += [part for arg in args if isinstance(arg, Int4Blocks) for part in arg if part is not None]
        if op == "rotate_and_write":
            written = 3 * 4 * 16 * dtype.itemsize  # keys and values
            tensors = [args[0], *args[1], args[0][:, :4]]
        else:
            written = sum(args[place].nbytes for place in case.written)
            tensors.append(case.op(*measure._copy(case.make(torch.Generator().manual_seed(0)))))
        assert case.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors) + written


def test_sixteen_bits_are_held_against_float32() -> None:
    work = Workload(MODEL_SHAPES["tiny"], torch.bfloat16, (3,), context=32, chunk=32)
    for op in MODEL_CASES:
        for case in MODEL_CASES[op](work):
            error = measure._error(case, case.make(torch.Generator().manual_seed(0)))
            assert 0 < error < case.tolerance, case.op.name


def off_by(factor: float) -> Provider[Any, Any]:
    def scale(gate_up: torch.Tensor) -> torch.Tensor:
        return silu_mul.reference(gate_up) * factor

    return Provider("wrong", scale, lambda gate_up: None)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(
        sys, "argv", ["powertrain", "bench", "kernels", "--device", "cpu", "--shape", "tiny", *arguments]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.001, 1), (float("nan"), 1)])
def test_a_wrong_provider_is_marked_and_fails_the_command(
    factor: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(silu_mul, "providers", (off_by(factor),))
    flags = ["--op", "rms_norm,silu_mul", "--rows", "2", "--verbose", "--json", str(tmp_path / "out.json")]
    assert run_command(monkeypatch, *flags) == status
    shown = capsys.readouterr().out
    assert ("! 2x96" in shown) == (status == 1)
    assert ("1 of 2 cases are wrong" in shown) == (status == 1)
    assert "rms_norm: not triton" in shown
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["ran"], row["is_correct"]) for row in rows] == [("reference", True), ("wrong", status == 0)]
    assert rows[1]["us"] > 0


def test_what_an_op_writes_in_place_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets_the_sum(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return add_rms_norm.reference(x.clone(), delta, weight, eps)

    provider: Provider[Any, Any] = Provider("forgetful", forgets_the_sum, lambda *args: None)
    monkeypatch.setattr(add_rms_norm, "providers", (provider,))
    assert measure.num_wrong(run(ops=["add_rms_norm"])) == 2


def test_a_provider_that_raises_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(gate_up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of\nresources")

    monkeypatch.setattr(silu_mul, "providers", (Provider("wrong", fails, lambda gate_up: None),))
    with pytest.raises(SystemExit, match="1"):
        measure.main(["--device", "cpu", "--shape", "tiny", "--rows", "1", "--op", "silu_mul", "--op", "rms_norm"])
    shown = capsys.readouterr().out
    assert "! silu_mul 1x96: RuntimeError: out of resources" in shown
    assert "1 of 2 cases are wrong" in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ops": ["rms_norm,nonsense"]}, "'nonsense'; known: rms_norm, add_rms_norm"),
        ({"shape": "gpt-2"}, "no shape 'gpt-2'; known: smollm2-135m"),
        ({"rows": (4, 0)}, "--rows must be positive"),
        ({"device": "cuda", "ops": [NATIVE_OP]}, "runs on a CPU"),
    ],
)
def test_what_is_not_known_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PowertrainError, match=message):
        measure.bench_kernels(**{"device": "cpu", **given})


@pytest.mark.parametrize("shape", ["llama-3.1-8b", "qwen3-0.6b"])
def test_the_table_fits_100_columns(shape: str) -> None:
    from rich.console import Console

    work = Workload(MODEL_SHAPES[shape], torch.bfloat16, (256,), chunk=2048)
    ceilings = Ceilings(1e9, 1e12, "cuda", "bfloat16", None)
    results = []
    for case in [case for op in MODEL_CASES for case in MODEL_CASES[op](work)]:
        row = measure._row(case, "none", ceilings)  # no such device, so nothing is made
        assert row["failure"]
        row.update(ran="reference", us=123456.7, fraction=1.234, error=1.2e-3, failure=None, is_correct=True)
        results.append(row)
    config = {"shape": shape, "device": "cuda"}
    made = {"results": results, "config": config, "ceilings": asdict(ceilings), "kernels": "Triton 3.6.0 kernels"}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(measure.table(made))
    for text in (measure.text_table(made), console.export_text()):
        assert max(len(line) for line in text.splitlines()) <= 100
        assert "…" not in text
        for row in results:
            assert row["label"] in text


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    made = measure.bench_kernels(device="cuda", shape="qwen3-0.6b", rows=(1, 100))
    assert [row for row in made["results"] if not row["is_correct"]] == []
    assert all(0 < row["fraction"] < 1.2 for row in made["results"])
    assert {row["ran"] for row in made["results"]} == {"triton", "reference"}
