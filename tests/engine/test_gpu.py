"""The same code on a CUDA device: float32 against the CPU, 16-bit against float32, formats, memory sizing."""

from __future__ import annotations

import random

import pytest
import torch

from powertrain.checkpoint.load import load_decoder, load_model, random_decoder, random_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import EngineConfig, resolve
from powertrain.engine.core import Engine
from powertrain.model.weights import IntWeight, pack_int_weight
from powertrain.types import Request, SamplingParams

pytestmark = pytest.mark.gpu
FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")


def generate(engine, prompts, num_tokens=24):
    for at, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens)
        engine.add(Request(request_id=str(at), prompt_token_ids=tuple(prompt), sampling=sampling))
    done = {str(at): [] for at in range(len(prompts))}
    while engine.has_work():
        for output in engine.step():
            done[output.request_id].extend(output.token_ids)
    assert engine.stats().num_blocks_in_use == 0
    return [done[str(at)] for at in range(len(prompts))]


def settled(**options):
    """The options as an engine on the device resolves them, with Triton's kernels."""
    config = EngineConfig.from_options(device="cuda", kernels="triton", **options)
    return resolve(config, has_cuda=True, model_dtype="bfloat16")


def mean_kl(expected, got):
    return (expected.softmax(-1) * (expected.log_softmax(-1) - got.log_softmax(-1))).sum(-1).mean()


def prompts(count, vocab=320):
    rng = random.Random(4)
    return [[rng.randrange(5, vocab) for _ in range(rng.randint(1, 60))] for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logits_equal_the_cpu(tiny_model_dir, family):
    torch.backends.cuda.matmul.allow_tf32 = False
    checkpoint = open_checkpoint(tiny_model_dir(family))
    ids = torch.randint(0, 320, (90,), generator=torch.Generator().manual_seed(0))
    cpu = load_model(checkpoint, "cpu", torch.float32).score(ids)
    for chunk in (512, 7, 1):
        gpu = load_model(checkpoint, "cuda", torch.float32).score(ids, chunk=chunk).cpu()
        torch.testing.assert_close(gpu, cpu, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_close(tiny_model_dir, family):
    checkpoint = open_checkpoint(tiny_model_dir(family))
    ids = torch.randint(0, 320, (90,), generator=torch.Generator().manual_seed(0))
    expected = load_model(checkpoint, "cpu", torch.float32).score(ids)
    got = load_model(checkpoint, "cuda", torch.bfloat16).score(ids).cpu()
    assert mean_kl(expected, got) < 0.02


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_batches_give_what_requests_alone_give(tiny_model_dir, family):
    torch.backends.cuda.matmul.allow_tf32 = False
    checkpoint = open_checkpoint(tiny_model_dir(family))
    model = load_model(checkpoint, "cuda", torch.float32)
    texts = prompts(20)

    def engine(**options):
        return Engine(model, EngineConfig.from_options(device="cuda", dtype="float32", **options), "tiny")

    alone = [generate(engine(num_blocks=100, enable_prefix_caching=False), [text])[0] for text in texts]
    tight = engine(num_blocks=24, max_num_batched_tokens=32, max_num_seqs=12, num_speculative_tokens=3)
    together = generate(tight, texts)
    assert tight.stats().num_preemptions > 0
    different = sum(a != b for a, b in zip(alone, together, strict=True))
    assert different <= 1, "only a tie may part them"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_formats_multiply_on_the_device(bits):
    half = 2 ** (bits - 1)
    values = torch.randint(-half, half, (256, 512), dtype=torch.int8)
    scale = torch.rand(256, 1 if bits == 8 else 8) * 0.01
    weight = IntWeight(values, scale, None, bits)
    fmt = pack_int_weight(weight, torch.device("cuda"))
    for rows in (1, 64):
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        expected = x.float() @ weight.dequantize().cuda().t()
        assert (fmt.matmul(x).float() - expected).norm() / expected.norm() < 2e-2


def test_the_pool_is_sized_from_device_memory(tiny_model_dir):
    model = random_model(tiny_model_dir("llama"), "cuda", torch.bfloat16)
    small = Engine(model, EngineConfig.from_options(device="cuda", gpu_memory_utilization=0.5, max_num_seqs=4), "tiny")
    assert small.info.num_blocks == 4 * small.info.max_model_len // 16
    assert small.info.device.startswith("cuda")


@pytest.mark.parametrize(("cache_dtype", "most"), [("int8", 0.01), ("fp8", 0.04)])
def test_8_bit_caches_stay_close_and_generate(tiny_model_dir, cache_dtype, most):
    model = load_decoder(open_checkpoint(tiny_model_dir("llama")), settled(dtype="bfloat16"))
    ids = torch.randint(0, 320, (90,), generator=torch.Generator().manual_seed(0))
    narrow = model.with_kv_cache_dtype(cache_dtype)
    for chunk in (512, 7, 1):
        assert mean_kl(model.score(ids, chunk=chunk), narrow.score(ids, chunk=chunk)) < most
    options = {"device": "cuda", "dtype": "bfloat16", "kernels": "triton", "num_blocks": 100}
    engine = Engine(model, EngineConfig.from_options(**options, kv_cache_dtype=cache_dtype), "tiny")
    engine.warm_up()
    assert engine.model.kv_cache_dtype == cache_dtype
    assert [len(text) for text in generate(engine, prompts(8))] == [24] * 8


def quantized_engine(folder, weight_format, dtype):
    options = {"dtype": dtype, "num_blocks": 200}
    model = random_decoder(folder, settled(**options), weight_format)
    assert any(name.startswith(weight_format) for name in model.formats())
    return Engine(model, EngineConfig.from_options(device="cuda", kernels="triton", **options), "tiny")


@pytest.mark.parametrize("weight_format", ["fp8", "int4", "int8"])
def test_quantized_random_weights_generate(tiny_model_dir, weight_format):
    engine = quantized_engine(tiny_model_dir("llama"), weight_format, "bfloat16")
    engine.warm_up()
    assert [len(text) for text in generate(engine, prompts(8), num_tokens=6)] == [6] * 8


@pytest.mark.parametrize("weight_format", ["fp8", "int4", "int8"])
def test_captured_steps_of_quantized_weights_equal_eager_ones(tiny_model_dir, weight_format):
    """Batches of the sizes that are captured, so that the graph's step has no padding and runs the same kernels."""
    eager = quantized_engine(tiny_model_dir("llama"), weight_format, "float32")
    captured = quantized_engine(tiny_model_dir("llama"), weight_format, "float32")
    captured.warm_up()
    for count in (1, 8):
        texts = prompts(count)
        assert generate(captured, texts) == generate(eager, texts)
