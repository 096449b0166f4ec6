"""Models in 2, 3, 5, 6 and 7 bits: the engine's logits are those of the weights that the library decodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig

from native_builders import needs_native
from powertrain.checkpoint.load import load_decoder, load_model
from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import Checkpoint, open_checkpoint
from powertrain.compress import compress
from powertrain.config import EngineConfig, resolve
from powertrain.types import QuantScheme

IDS = torch.arange(80) * 13 % 300

SCHEMES = {
    f"{bits} bits{'' if symmetric else ' asymmetric'}, {group}": (bits, symmetric, group)
    for bits in (2, 3, 5, 6, 7)
    for symmetric, group in ((True, 32), (False, 32), (False, "channel"))
}
each_scheme = pytest.mark.parametrize(("bits", "symmetric", "group"), SCHEMES.values(), ids=SCHEMES)


@pytest.fixture
def pair(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, bits: int, symmetric: bool, group: int | str
) -> tuple[Checkpoint, Checkpoint]:
    """The model in that scheme, and a dense one of the weights that the library finds in the same files."""
    from powertrain.compress.recipe import Recipe, Step

    scheme = QuantScheme(num_bits=bits, group_size=None if isinstance(group, str) else group, symmetric=symmetric)
    step = Step(match=("Linear",), scheme_name=f"W{bits}A16", scheme=scheme)
    compress(tiny_model_dir("llama"), tmp_path / "out", Recipe(name="few", steps=(step,)), dtype="bfloat16")
    made = open_checkpoint(tmp_path / "out")
    theirs = QuantizationConfig.model_validate(made.config["quantization_config"]).config_groups["group_0"]
    dense: dict[str, torch.Tensor] = {}
    for name in made.names():
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
            state = {part: made.load(f"{layer}.{part}") for part in parts if f"{layer}.{part}" in made.names()}
            state["weight_scale"] = state["weight_scale"].float()
            dense[f"{layer}.weight"] = PackedQuantizationCompressor.decompress(state, theirs)["weight"]
        elif suffix == "weight":
            dense[name] = made.load(name).float()
    config = {key: value for key, value in made.config.items() if key != "quantization_config"}
    return made, open_checkpoint(write_checkpoint(tmp_path / "dense", config, dense.items()))


@each_scheme
def test_the_reference_runs_them(pair: tuple[Checkpoint, Checkpoint], bits: int) -> None:
    quantized, dense = (load_model(checkpoint, "cpu", torch.float32) for checkpoint in pair)
    assert set(quantized.formats()) & {"int4", "int8", "int8 group"}
    expected = dense.score(IDS)
    # minima of 4-bit formats are kept in bfloat16
    assert (quantized.score(IDS) - expected).norm() < (5e-3 if bits < 4 else 1e-5) * expected.norm()


@each_scheme
@needs_native
def test_the_native_kernels_run_them(
    pair: tuple[Checkpoint, Checkpoint], bits: int, group: int | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POWERTRAIN_CACHE", str(tmp_path / "cache"))
    options = EngineConfig.from_options(device="cpu", kernels="native", threads=1)
    config = resolve(options, has_cuda=False, model_dtype="float32")
    decoder = load_decoder(pair[0], config)
    name = "int4" if bits < 4 else "int8"
    assert (name if isinstance(group, str) else f"{name} g{group}") in decoder.formats()
    assert all(len(linear.formats) == 1 for linear in decoder.linears())
    expected = load_model(pair[1], "cpu", torch.float32).score(IDS)
    logits = decoder.with_kv_cache_dtype("float32").score(IDS)
    assert (logits - expected).norm() < 1e-5 * expected.norm()


def test_widths_that_run_alike_are_one_product(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    steps = [
        {"match": f"re:.*{kind}_proj", "scheme": scheme, "group_size": 32}
        for kind, scheme in (("q", "W3A16"), ("k", "W2A16"), ("v", "W4A16"), ("gate", "W5A16"), ("up", "W3A16"))
    ]
    compress(tiny_model_dir("llama"), tmp_path / "out", {"steps": steps})
    block = load_model(open_checkpoint(tmp_path / "out"), "cpu", torch.float32).blocks[0]
    assert [fmt.name for fmt in block.attention.qkv.formats] == ["int4"]
    assert [fmt.name for fmt in block.mlp.gate_up.formats] == ["int8 group", "int4"]
