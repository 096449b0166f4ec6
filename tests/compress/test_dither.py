"""Dithering: off every grid, within half a step of where each weight was, and nothing else touched."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.checkpoint.safetensors_folder import write_checkpoint
from powertrain.checkpoint.source import iterate, open_checkpoint
from powertrain.checkpoint.tokenizer_files import hugging_face_files
from powertrain.compress import compress, load_recipe, plan_compression
from powertrain.compress.dither import dithered, generator_of, grid_steps
from powertrain.compress.leak import find_grid
from powertrain.compress.model_step import CheckpointView, shapes_of
from powertrain.compress.quantize import rtn
from powertrain.distill.run import TextConfig, distill
from powertrain.distill.trainer import TrainConfig
from powertrain.measure.evaluate import evaluate
from powertrain.types import PowertrainError, QuantScheme

TinyModel = Callable[[str], Path]
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def weight(rows: int = 64, columns: int = 192, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_files_weights_leave_the_grid_by_half_a_step_at_most(kind: str) -> None:
    packed = gguf.quants.quantize(weight().numpy(), gguf.GGMLQuantizationType[kind])
    rounded = torch.from_numpy(np.asarray(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])))
    grid = find_grid(rounded)
    assert grid is not None
    moved = dithered(rounded, grid, generator_of(0, "w"))
    assert find_grid(moved) is None
    # the scale of a block is its first half-precision number
    scale = torch.from_numpy(packed.reshape(-1, packed.shape[1] // (192 // 32))[:, :2].copy().view(np.float16))
    share = (moved - rounded).view(-1, 32) / scale.float()
    assert float(share.abs().max()) <= 0.5 * (1 + 1e-4)
    # uniform over the whole step
    assert float(share.var()) == pytest.approx(1 / 12, rel=0.03)
    assert abs(float(share.mean())) < 0.01


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.sampled_from([32, 64]), st.integers(0, 99))
def test_steps_are_those_of_our_own_rounding_or_a_part_of_them(
    num_bits: int, symmetric: bool, group_size: int, seed: int
) -> None:
    scheme = QuantScheme(num_bits=num_bits, group_size=group_size, symmetric=symmetric)
    ints = rtn(weight(8, 128, seed), scheme, scale_dtype=torch.float32)[0]
    groups = ints.dequantize().double().view(-1, group_size)
    made, found = ints.scale.double().flatten(), grid_steps(groups, num_bits)
    varied = groups.amax(1) > groups.amin(1)
    assert torch.equal(found[~varied], torch.zeros_like(found[~varied]))
    ratio = (made / found)[varied]
    torch.testing.assert_close(ratio, ratio.round(), rtol=0, atol=1e-3)
    assert float(ratio.min()) > 0.99


def test_groups_off_the_grid_and_constant_ones_stay() -> None:
    on, off, same = torch.arange(16.0).repeat(1, 2), weight(1, 32), torch.full((1, 32), 0.25)
    groups = torch.cat((on, off, same)).double()
    assert grid_steps(groups, 4).tolist() == [1.0, 0.0, 0.0]
    # a group of more levels than the sampled ones showed is still found
    wide = (torch.arange(32.0) ** 2 % 61).double().view(1, 32)
    assert float(grid_steps(wide, 4)) == 1.0


@pytest.fixture
def quantized_dir(tiny_model_dir: TinyModel, tmp_path: Path) -> Path:
    """The tiny model, its MLP matrices on a 4-bit grid."""
    return on_grid(tiny_model_dir("llama"), tmp_path / "quantized", "mlp.gate_proj")


def on_grid(folder: Path, out: Path, which: str) -> Path:
    source = open_checkpoint(folder)
    scheme = QuantScheme(num_bits=4, group_size=32, symmetric=False)

    def load(name: str) -> torch.Tensor:
        tensor = source.load(name)
        if which not in name or tensor.dim() < 2 or tensor.shape[1] % 32:
            return tensor
        return rtn(tensor, scheme, scale_dtype=torch.float32)[0].dequantize()

    view = CheckpointView(source, shapes_of(source), load)
    write_checkpoint(out, source.config, iterate(view), hugging_face_files(folder))
    return out


def test_only_matrices_on_a_grid_move_and_always_the_same_way(quantized_dir: Path, tmp_path: Path) -> None:
    report = compress(quantized_dir, tmp_path / "one", "dithered", dtype="float32")
    compress(quantized_dir, tmp_path / "same", "dithered", dtype="float32")
    recipe = {"steps": [{"method": "dither", "seed": 1}]}
    compress(quantized_dir, tmp_path / "other", recipe, dtype="float32")
    assert report.warnings == ()
    source, one, other = (open_checkpoint(path) for path in (quantized_dir, tmp_path / "one", tmp_path / "other"))
    moved = [name for name in source.names() if not torch.equal(source.load(name), one.load(name))]
    assert moved == [name for name in source.names() if "gate_proj" in name]
    for name in moved:
        assert find_grid(source.load(name)) is not None
        assert find_grid(one.load(name)) is None
        assert not torch.equal(one.load(name), other.load(name))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same")]
    assert files[0] == files[1]


def test_the_step_is_told_kept_and_checked(tiny_model_dir: TinyModel) -> None:
    assert "a worse one until" in plan_compression(tiny_model_dir("llama"), "dithered").table()
    recipe = load_recipe({"steps": [{"method": "dither", "seed": 3}, {"match": "Linear", "scheme": "W8A16"}]})
    assert load_recipe(recipe.to_dict()) == recipe
    for entries, message in (({"seed": -1}, r"steps\[0\].seed must be"), ({"bits": 4}, "unknown key 'bits'")):
        with pytest.raises(PowertrainError, match=message):
            load_recipe({"steps": [{"method": "dither", **entries}]})


def test_a_twin_is_worse_and_healing_brings_it_back(stories260k_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    source = on_grid(stories260k_dir, tmp_path / "quantized", "proj")
    compress(source, tmp_path / "twin", "dithered", dtype="float32")
    text = tmp_path / "text.txt"
    with gzip.open(shared_dir / "data" / "calibration" / "tinystories.txt.gz", "rt", encoding="utf-8") as stories:
        text.write_text(stories.read(120_000))
    distill(
        source,
        tmp_path / "twin",
        tmp_path / "healed",
        data=[text],
        text=TextConfig(length=128, batch_size=4, held_out_windows=4),
        config=TrainConfig(steps=30, learning_rate=1e-3),
        dtype="float32",
    )
    healed = open_checkpoint(tmp_path / "healed")
    assert all(find_grid(healed.load(name)) is None for name in healed.names())
    kls = [evaluate(tmp_path / name, source, num_tokens=1024, window=256).kl_mean for name in ("twin", "healed")]
    assert 0 < kls[1] < 0.95 * kls[0]
