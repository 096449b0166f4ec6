"""The table of measured launch settings: what is shipped, how an entry is found, and the tool that writes it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from powertrain.kernels.gpu import matmul, quantized, rounded_matmul, row_matmul, sliced_matmul, tuned_table
from powertrain.kernels.matmul import dense_linear
from powertrain.kernels.model_cases import MODEL_SHAPES, ModelShape

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # the interpreter's
FEW_AND_MORE = (tuned_table.FEW_ROWS, *tuned_table.ROWS)
SETTINGS = {
    "dense_linear": (matmul.SkinnyConfig, FEW_AND_MORE),
    "row": (row_matmul.RowConfig, (1,)),
    "sliced": (sliced_matmul.SlicedConfig, FEW_AND_MORE),
    "rounded": (rounded_matmul.RoundedConfig, FEW_AND_MORE),
    **dict.fromkeys(("tile", "int4", "fp8", "int8"), (quantized.QuantizedConfig, FEW_AND_MORE)),
}
"""By the first word of a product's name, but for rounded ones: its kernel's settings and an entry's rows."""
SHIPPED = sorted(tuned_table.FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks/tune_gpu.py"
    spec = importlib.util.spec_from_file_location("tune_gpu", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tune_gpu"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_entry_has_the_settings_of_its_kernel(file: Path, tmp_path: Path) -> None:
    table = tuned_table.read(file)
    for product, entries in table.items():
        kernel, all_rows = SETTINGS[product.split()[0] if "rounded" not in product else "rounded"]
        for (_, _, rows, is_gated), entry in entries.items():
            assert set(kernel._fields) <= set(entry)
            assert rows in all_rows
            assert not (is_gated and entry.get("splits", 1) > 1)
    tuned_table.write(tmp_path / "again.json", table)
    assert tuned_table.read(tmp_path / "again.json") == table


def test_an_entry_serves_up_to_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"outputs": 128, "splits": 2, "swaps": True, "num_warps": 8, "num_stages": 3}
    table = {"tile bfloat16": {(320, 64, 128, False): entry}, "int4 bfloat16": {(96, 64, 32, False): entry}}
    monkeypatch.setattr(tuned_table, "of_device", lambda device: table)
    gpu = torch.device("cuda")
    assert [tuned_table.measured("tile bfloat16", gpu, 320, 64, rows, False) for rows in (64, 65, 128, 129)] == [
        None,
        entry,
        entry,
        None,
    ]
    assert tuned_table.measured("tile bfloat16", torch.device("cpu"), 320, 64, 100, False) is None
    assert tuned_table.rows_of_entry(257) is None


def test_a_dense_product_of_many_rows_is_the_librarys_unless_measured() -> None:
    x, weight = torch.ones(65, 8), torch.ones(4, 8)
    (fast,) = (provider for provider in dense_linear.providers if "fast" in provider.modes)
    assert fast.accepts(x, weight) == "the tensors are not on a CUDA device"
    from powertrain.kernels.matmul import _refuse_many_rows

    assert "the library's product is faster" in (_refuse_many_rows(x, weight) or "")
    assert _refuse_many_rows(x[:64], weight) is None


def test_the_tool_measures_every_product_and_keeps_what_it_does_not(
    tune: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU under Triton's interpreter, with few candidates."""
    monkeypatch.setitem(MODEL_SHAPES, "tiny", ModelShape(128, 128, 2, 1, 64, 96))
    few = tune.candidates
    monkeypatch.setattr(tune, "candidates", lambda problem: [*few(problem)][:1])
    monkeypatch.setattr(tuned_table, "FOLDER", tmp_path)
    kept = {"out": 7, "in": 8, "rows": 16, "gated": False, "outputs": 64, "splits": 1, "swaps": False}
    kept |= {"num_warps": 2, "num_stages": 5}
    tuned_table.write(tmp_path / "cpu.json", {"int4 bfloat16": {(7, 8, 16, False): kept}})
    monkeypatch.setattr(
        sys, "argv", ["tune_gpu", "--shape", "tiny", "--device", "cpu", "--rows", "1,16,128", "--processes", "1"]
    )
    tune.main()
    table = tuned_table.read(tmp_path / "cpu.json")
    assert table["int4 bfloat16"][7, 8, 16, False] == kept
    assert set(table) == {f"{product} bfloat16" for product in tune.PRODUCTS}
    assert (128, 128, 16, True) in table["fp8 bfloat16"]
    assert (256, 128, 128, False) in table["int8 bfloat16"]
    assert "without" in capsys.readouterr().out
