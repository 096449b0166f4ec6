from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from powertrain.measure import roofline
from powertrain.measure.roofline import Ceilings, ConfigCosts, decode_floor, prefill_floor
from powertrain.model.families import model_config
from powertrain.types import PowertrainError

LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
H100 = Ceilings(3.0e12, 800e12, "cuda", "bfloat16", None)


def costs_8b(weight_format: str = "none") -> ConfigCosts:
    return ConfigCosts(config=model_config(LLAMA_8B), weight_format=weight_format, dtype_bytes=2)


@pytest.mark.parametrize(
    ("batch", "expected_ms"), [(1, 5.05), (8, 5.36), (32, 6.43), (64, 7.87), (128, 10.73), (256, 16.46)]
)
def test_floors_of_the_8b_shape_are_the_ones_worked_out_by_hand(batch: int, expected_ms: float) -> None:
    """The decode floors of a Llama-3.1-8B shape in bf16 at 1024 tokens, 3.0 TB/s and 800 TFLOP/s."""
    floor = decode_floor(costs_8b(), H100, batch, 1024)
    assert floor.ms == pytest.approx(expected_ms, rel=2e-3)
    assert floor.bound == "memory"


def test_bytes_of_the_8b_shape() -> None:
    dense = costs_8b()
    assert dense.step_bytes() == pytest.approx(15.01e9, rel=1e-3)
    assert dense.kv_bytes_per_token() == 128 * 1024
    head = 128256 * 4096 * 2
    layers = dense.step_bytes() - head
    assert costs_8b("int8").step_bytes() == pytest.approx(head + layers / 2, rel=1e-3)
    assert costs_8b("int4").step_bytes() == pytest.approx(head + layers / 2 * (0.5 + 2 / 64), rel=1e-3)


def test_large_batches_of_narrow_weights_are_bound_by_compute() -> None:
    from_batch = roofline.compute_bound_batch(costs_8b("int4"), H100)
    slow_memory = Ceilings(3.0e12, 100e12, "cuda", "bfloat16", None)
    assert roofline.compute_bound_batch(costs_8b(), H100) > 2 * from_batch > 2
    assert decode_floor(costs_8b("int4"), slow_memory, 256, 16).bound == "compute"
    assert prefill_floor(costs_8b(), H100, 8192).bound == "compute"
    assert prefill_floor(costs_8b(), H100, 1).bound == "memory"


def test_prefill_runs_the_head_once() -> None:
    """1024 tokens through 6.98 G layer weights at 800 TFLOP/s: 17.9 ms; the head for all of them would add 1.3 ms."""
    floor = prefill_floor(costs_8b(), H100, 1024)
    attention_ms = 1024 * 512 * 4 * 32 * 32 * 128 / 800e12 * 1e3
    assert floor.ms == pytest.approx(1024 * 2 * 6.98e9 / 800e12 * 1e3 + attention_ms, rel=5e-3)


def test_the_machine_is_measured_and_torch_threads_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_CPU_BUFFER_BYTES", 8 * 2**20)
    before = torch.get_num_threads()
    measured = roofline.measure_ceilings("cpu", threads=1)
    assert torch.get_num_threads() == before
    assert 1e8 < measured.read_bytes_per_s < 1e13
    assert 1e8 < measured.matmul_flops_per_s < 1e14
    assert (measured.device, measured.dtype, measured.threads) == ("cpu", "float32", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_line() -> None:
    with pytest.raises(PowertrainError, match="CUDA"):
        roofline.measure_ceilings("cuda")


def test_card_of_a_bare_config(tmp_path: Path) -> None:
    from rich.console import Console

    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    card = roofline.card(tmp_path, device="cuda", batches=(1, 256), context=1024, ceilings=H100)
    made = json.loads(json.dumps(card.to_dict()))
    assert [row["name"] for row in made["results"]] == ["none", "int8", "int4"]
    dense = made["results"][0]
    assert dense["decode"][0]["floor_ms"] == pytest.approx(5.05, rel=2e-3)
    assert dense["decode"][1]["output_tokens_per_s"] == pytest.approx(15_556, rel=2e-3)
    assert dense["prefill"]["bound"] == "compute"
    assert made["kernels"] == "", "native kernels are for CPUs"
    console = Console(width=80)
    with console.capture() as captured:
        console.print(card.table())
    assert "5.05" in captured.get()
    assert "3,000.0 GB/s" in captured.get()
    assert max(map(len, captured.get().splitlines())) <= 80


def test_card_of_a_checkpoint_agrees_with_the_loaded_model(tiny_model_dir: Callable[[str], Path]) -> None:
    from rich.console import Console

    from powertrain.checkpoint.load import load_model
    from powertrain.checkpoint.source import open_checkpoint
    from powertrain.kernels import native

    folder = tiny_model_dir("llama")
    ceilings = Ceilings(1e10, 1e11, "cpu", "float32", 1)
    card = roofline.card(folder, device="cpu", context=16, batches=(2,), ceilings=ceilings)
    decoder = load_model(open_checkpoint(folder), "cpu", torch.float32)
    floor = decode_floor(decoder, ceilings, 2, 16)
    row = card.to_dict()["results"][0]
    assert card.to_dict()["kernels"] == native.describe()
    console = Console(width=200)
    with console.capture() as captured:
        console.print(card.table())
    assert native.describe() in captured.get()
    assert card.kv_bytes_per_token == decoder.kv_bytes_per_token()
    assert row["decode"][0]["floor_ms"] == pytest.approx(floor.ms, rel=1e-2)
