"""4-bit floats, and 8-bit ones with static input scales, on a CUDA device: torch ops, in steps that are captured."""

from __future__ import annotations

import pytest
import torch

from powertrain.checkpoint.float4 import float4_weight_tensors
from powertrain.checkpoint.float8 import float8_weight_tensors
from powertrain.checkpoint.float_presets import float_group
from powertrain.checkpoint.load import load_decoder, load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.compress.floats import to_float8, to_mxfp4, to_nvfp4
from powertrain.config import EngineConfig, resolve
from powertrain.engine.core import Engine
from powertrain.types import PowertrainError, Request, SamplingParams
from quantized_builders import write_pair

pytestmark = pytest.mark.gpu
IDS = torch.arange(80) * 13 % 300
NAMES = {"NVFP4A16": "nvfp4", "MXFP4A16": "mxfp4", "FP8": "fp8 a8 static"}


def quantize_with(preset):
    def quantize(layer, weight):
        if preset == "FP8":
            rounded, _ = to_float8(weight, "tensor")
            tensors = float8_weight_tensors("a", rounded, "tensor", input_scale=0.02)
        else:
            rounded, _ = (to_nvfp4 if preset == "NVFP4A16" else to_mxfp4)(weight, search=True)
            tensors = float4_weight_tensors("a", rounded)
        return {name.removeprefix("a."): tensor for name, tensor in tensors.items()}, rounded.dequantize()

    return quantize


@pytest.fixture(params=NAMES)
def folders(request, tiny_model_dir, tmp_path):
    group = float_group(request.param, ["Linear"])
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    pair = write_pair(tiny_model_dir("llama3"), tmp_path, config, quantize_with(request.param))
    return request.param, *pair


def settled(**options):
    config = EngineConfig.from_options(device="cuda", kernels="triton", **options)
    return resolve(config, has_cuda=True, model_dtype="bfloat16")


def test_logits_are_those_of_the_cpu(folders):
    torch.backends.cuda.matmul.allow_tf32 = False
    preset, quantized, dense = folders
    model = load_model(open_checkpoint(quantized), "cuda", torch.float32)
    assert model.formats() == sorted(["float32", NAMES[preset]])
    # rounding inputs is part of what the 8-bit file means
    judge = quantized if preset == "FP8" else dense
    expected = load_model(open_checkpoint(judge), "cpu", torch.float32).score(IDS)
    difference = (model.score(IDS).cpu() - expected).abs()
    assert difference.mean() < (0.02 if preset == "FP8" else 1e-4) * expected.abs().mean()


def test_4_bits_are_kept(folders):
    preset, quantized, _ = folders
    model = load_model(open_checkpoint(quantized), "cuda", torch.bfloat16)
    down = model.blocks[0].mlp.down.formats[0]
    bits = {"NVFP4A16": 4.5, "MXFP4A16": 4.25, "FP8": 8}[preset]
    extra = {"NVFP4A16": 4, "MXFP4A16": 0, "FP8": 4 * 64}[preset]
    assert down.nbytes() == 64 * 96 * bits / 8 + extra


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_steps_equal_eager_ones(folders, dtype):
    def engine():
        options = {"dtype": dtype, "num_blocks": 200}
        model = load_decoder(open_checkpoint(folders[1]), settled(**options))
        return Engine(model, EngineConfig.from_options(device="cuda", kernels="triton", **options), "tiny")

    def generate(engine):
        sampling = SamplingParams(temperature=0.0, max_tokens=12)
        engine.add(Request(request_id="0", prompt_token_ids=(5, 6, 7, 8, 9), sampling=sampling))
        tokens = []
        while engine.has_work():
            for output in engine.step():
                tokens += output.token_ids
        return tokens

    eager, captured = engine(), engine()
    captured.warm_up()
    assert generate(captured) == generate(eager)


def test_deterministic_is_refused_by_name(folders):
    preset, quantized, _ = folders
    with pytest.raises(PowertrainError, match=f"no batch-invariant product for weights in {NAMES[preset]}"):
        load_decoder(open_checkpoint(quantized), settled(dtype="bfloat16", deterministic=True))
