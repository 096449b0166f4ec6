"""The engine on tiny real decoders: greedy truth, batch invariance, every way a request can end."""

from __future__ import annotations

import logging
import random

import pytest
import torch

from powertrain.checkpoint.load import load_model, random_decoder
from powertrain.checkpoint.source import open_checkpoint
from powertrain.config import EngineConfig
from powertrain.engine import memory as engine_memory
from powertrain.engine.core import Engine
from powertrain.engine.runner import Runner
from powertrain.model.gpu_memory import must_fit
from powertrain.types import FinishReason, InvalidRequest, PowertrainError, Request, SamplingParams

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
TIE = 1e-3


@pytest.fixture(scope="module")
def models(tiny_model_dir):
    loaded = {}

    def get(family):
        if family not in loaded:
            loaded[family] = load_model(open_checkpoint(tiny_model_dir(family)), "cpu", torch.float32)
        return loaded[family]

    return get


def engine_of(model, **options):
    options.setdefault("num_blocks", 200)
    return Engine(model, EngineConfig.from_options(device="cpu", **options), "tiny")


def run(engine, requests):
    """All requests to their ends: {(id, index): (token ids, finish reason, outputs)}."""
    for request in requests:
        engine.add(request)
    done = {}
    while engine.has_work():
        for output in engine.step():
            tokens, outputs = done.setdefault((output.request_id, output.index), ([], []))
            tokens.extend(output.token_ids)
            outputs.append(output)
        engine.scheduler.check()
    assert engine.stats().num_blocks_in_use == 0
    return {key: (tokens, outputs[-1].finish_reason, outputs) for key, (tokens, outputs) in done.items()}


def request(name, prompt, eos=(), salt="", **sampling):
    sampling.setdefault("temperature", 0.0)
    return Request(
        request_id=name,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**sampling),
        eos_token_ids=eos,
        cache_salt=salt,
    )


def prompts(count, vocab, longest=60, seed=0):
    rng = random.Random(seed)
    shared = [rng.randrange(5, vocab) for _ in range(40)]
    made = []
    for at in range(count):
        own = [rng.randrange(5, vocab) for _ in range(rng.randint(1, longest))]
        made.append(shared[: rng.choice((16, 33, 40))] + own if at % 3 == 0 else own)
    return made


def count_ties(model, prompt, left, right):
    """0 if equal; 1 if they part where the model's two best are within TIE of each other; else a failure."""
    if left == right:
        return 0
    at = next(i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
    top = model.score(torch.tensor([*prompt, *left[:at]]))[-1].topk(2).values
    assert top[0] - top[1] < TIE, f"different tokens at {at} without a tie"
    return 1


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_teacher_forced_argmax(models, family):
    model = models(family)
    for prompt in prompts(5, model.config.vocab_size):
        ((tokens, reason, _),) = run(engine_of(model), [request("a", prompt, max_tokens=32)]).values()
        assert reason is FinishReason.LENGTH
        logits = model.score(torch.tensor([*prompt, *tokens]))[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert (logits.max(-1).values - chosen < TIE).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_invariance(models, family):
    """Alone = in a full, chunked, preempted, prefix-cached, speculating batch."""
    model = models(family)
    texts = prompts(100 if family == "llama" else 25, model.config.vocab_size)
    alone = {}
    for at, prompt in enumerate(texts):
        engine = engine_of(model, enable_prefix_caching=False)
        alone[at] = run(engine, [request("a", prompt, max_tokens=24)])["a", 0][0]
    for options in (
        {"num_blocks": 28, "max_num_batched_tokens": 32, "max_num_seqs": 12},
        {"num_blocks": 28, "max_num_batched_tokens": 32, "max_num_seqs": 12, "num_speculative_tokens": 3},
    ):
        engine = engine_of(model, **options)
        together = run(engine, [request(str(at), prompt, max_tokens=24) for at, prompt in enumerate(texts)])
        stats = engine.stats()
        assert stats.num_preemptions > 0
        assert stats.prefix_cache_hits > 0
        ties = sum(count_ties(model, texts[at], alone[at], together[str(at), 0][0]) for at in alone)
        print(f"{family}: {ties} ties in {24 * len(texts)} tokens")
        assert ties <= 0.003 * 24 * len(texts)


def test_speculation_accepts_and_changes_nothing(models):
    model = models("llama")
    texts = [[5, 6, 7, 8] * 6 + [at + 9] for at in range(20)]
    plain = run(engine_of(model), [request(str(at), p, max_tokens=40) for at, p in enumerate(texts)])
    engine = engine_of(model, num_speculative_tokens=4)
    fast = run(engine, [request(str(at), p, max_tokens=40) for at, p in enumerate(texts)])
    ties = sum(count_ties(model, texts[int(k[0])], plain[k][0], fast[k][0]) for k in plain)
    assert ties <= 2
    assert engine.stats().accepted_draft_tokens > 50
    assert engine.stats().num_steps < 40 * 1.2


def test_seeded_sampling_repeats_in_any_company(models):
    model = models("llama")
    wanted = {"temperature": 0.9, "seed": 5, "max_tokens": 30, "top_p": 0.9}
    alone = run(engine_of(model), [request("a", [9, 8, 7], **wanted)])["a", 0][0]
    crowd = [request(f"x{at}", [at + 5] * 9, temperature=1.0, max_tokens=20) for at in range(8)]
    engine = engine_of(model, num_blocks=16, max_num_batched_tokens=16, num_speculative_tokens=2)
    assert run(engine, [*crowd, request("a", [9, 8, 7], **wanted)])["a", 0][0] == alone
    assert run(engine_of(model), [request("a", [9, 8, 7], **wanted | {"seed": 6})])["a", 0][0] != alone


def test_n_sequences_differ_and_share_the_prompt(models):
    engine = engine_of(models("llama"))
    prompt = list(range(5, 45))
    done = run(engine, [request("a", prompt, temperature=1.0, n=3, max_tokens=12, seed=1)])
    texts = {tuple(tokens) for tokens, _, _ in done.values()}
    assert sorted(done) == [("a", 0), ("a", 1), ("a", 2)]
    assert len(texts) == 3
    assert [done["a", at][2][0].num_cached_tokens for at in range(3)] == [0, 32, 32]


def test_eos_stop_ids_ignore_eos_and_min_tokens(models):
    model = models("llama")
    plain = run(engine_of(model), [request("a", [5, 6], max_tokens=20)])["a", 0][0]
    third = plain[2]
    first = plain.index(third)
    tokens, reason, outputs = run(engine_of(model), [request("a", [5, 6], eos=(third,), max_tokens=20)])["a", 0]
    assert (tokens, reason, outputs[-1].stop_token_id) == (plain[: first + 1], FinishReason.STOP, third)
    kept = run(engine_of(model), [request("a", [5, 6], eos=(third,), max_tokens=20, ignore_eos=True)])["a", 0]
    assert kept[0] == plain
    stopped = run(engine_of(model), [request("a", [5, 6], stop_token_ids=(third,), max_tokens=20)])["a", 0]
    assert stopped[0] == plain[: first + 1]
    late = run(engine_of(model), [request("a", [5, 6], eos=(third,), max_tokens=20, min_tokens=10)])["a", 0]
    assert third not in late[0][:10]


def test_logprobs_and_prompt_logprobs_equal_the_model(models):
    model = models("qwen3")
    prompt = prompts(1, model.config.vocab_size)[0]
    engine = engine_of(model, max_num_batched_tokens=16)
    run(engine, [request("warm", prompt, max_tokens=2)])
    tokens, _, outputs = run(engine, [request("a", prompt, max_tokens=5, logprobs=2, prompt_logprobs=3)])["a", 0]
    table = model.score(torch.tensor([*prompt, *tokens])).log_softmax(-1)
    given = outputs[0].prompt_logprobs
    assert given[0] is None
    assert len(given) == len(prompt)
    for at, entry in enumerate(given[1:], 1):
        assert entry.token_id == prompt[at]
        assert entry.logprob == pytest.approx(table[at - 1, prompt[at]].item(), abs=1e-4)
        assert len(entry.top_token_ids) == 3
    entries = [entry for output in outputs for entry in output.logprobs]
    for at, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(table[len(prompt) - 1 + at, tokens[at]].item(), abs=1e-4)
    assert all(output.prompt_logprobs is None for output in outputs[1:])


def test_scoring_a_prompt_without_generating(models):
    tokens, reason, outputs = run(
        engine_of(models("llama")), [request("a", [5, 6, 7], max_tokens=0, prompt_logprobs=0)]
    )["a", 0]
    assert (tokens, reason) == ([], FinishReason.LENGTH)
    assert len(outputs[0].prompt_logprobs) == 3


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
def test_abort_in_any_state_frees_everything_and_changes_nobody_else(models, steps):
    model = models("llama")
    expected = run(engine_of(model), [request("b", [9] * 30, max_tokens=12)])["b", 0][0]
    engine = engine_of(model, max_num_batched_tokens=24)
    engine.add(request("a", list(range(5, 65)), max_tokens=50, n=2))
    engine.add(request("b", [9] * 30, max_tokens=12))
    tokens = []
    for _ in range(steps):
        tokens += [t for output in engine.step() if output.request_id == "b" for t in output.token_ids]
    engine.abort("a")
    engine.abort("nobody")
    engine.scheduler.check()
    while engine.has_work():
        outputs = engine.step()
        assert all(output.request_id == "b" for output in outputs)
        tokens += [t for output in outputs for t in output.token_ids]
    assert tokens == expected
    assert engine.stats().num_blocks_in_use == 0


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ([], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([320], {}, "prompt"),
        ([5] * 512, {}, "prompt"),
        ([5], {"stop_token_ids": (320,)}, "stop_token_ids"),
        ([5], {"logit_bias": {320: 1.0}}, "logit_bias"),
        ([5], {"top_k": 321}, "top_k"),
    ],
)
def test_what_can_never_run_is_refused_by_name(models, prompt, sampling, param):
    engine = engine_of(models("llama"))
    with pytest.raises(InvalidRequest) as error:
        engine.add(request("a", prompt, **sampling))
    assert error.value.param == param
    assert not engine.has_work()
    assert run(engine, [request("b", [5, 6], max_tokens=3)])["b", 0][1] is FinishReason.LENGTH


def test_a_prompt_beyond_the_pool_is_refused_and_one_that_fills_it_ends(models):
    engine = engine_of(models("llama"), num_blocks=4)
    with pytest.raises(InvalidRequest, match="the KV cache holds 64"):
        engine.add(request("a", [5] * 64))
    tokens, reason, _ = run(engine, [request("b", [5] * 60, max_tokens=100)])["b", 0]
    assert (len(tokens), reason) == (4, FinishReason.LENGTH)


def test_a_length_beyond_the_model_is_refused(models):
    with pytest.raises(PowertrainError, match="max_model_len 513 exceeds the 512 positions"):
        engine_of(models("llama"), max_model_len=513)


def test_a_failing_step_ends_its_requests_and_not_the_engine(models, monkeypatch):
    engine = engine_of(models("llama"))
    for _ in range(100):
        engine.add(request("a", [5, 6, 7], max_tokens=4))
        with monkeypatch.context() as patch:
            patch.setattr(engine.runner, "execute", lambda plan: 1 / 0)
            (output,) = engine.step()
        assert output.finish_reason is FinishReason.ERROR
        assert "ZeroDivisionError" in output.error
    assert not engine.has_work()
    assert engine.stats().num_blocks_in_use == 0
    assert run(engine, [request("b", [5, 6], max_tokens=3)])["b", 0][1] is FinishReason.LENGTH


TOO_LARGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.06 GiB is "
    "free. Of the allocated memory 70.00 GiB is allocated by PyTorch."
)


def run_out(*args, **kwargs):
    raise torch.OutOfMemoryError(TOO_LARGE)


def test_a_step_that_does_not_fit_names_the_setting(models, monkeypatch):
    engine = engine_of(models("llama"))
    engine.add(request("a", [5, 6, 7], max_tokens=4))
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "execute", run_out)
        (output,) = engine.step()
    assert output.finish_reason is FinishReason.ERROR
    assert "out of GPU memory for this step (2.50 GiB asked for, 1.06 GiB of 79.19 GiB free)" in output.error
    assert "--max-num-batched-tokens" in output.error
    assert run(engine, [request("b", [5, 6], max_tokens=3)])["b", 0][1] is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("place", "function", "says"),
    [
        ("powertrain.checkpoint.load", "load_model", "the weights .*a smaller model or format"),
        ("powertrain.model.decoder", "KVCache", "the KV pool .*--gpu-memory-utilization.*--kv-cache-dtype fp8"),
    ],
)
def test_a_start_that_does_not_fit_names_the_setting(tiny_model_dir, monkeypatch, place, function, says):
    config = EngineConfig.from_options(device="cpu", kernels="reference", max_num_seqs=2)
    monkeypatch.setattr(f"{place}.{function}", run_out)
    with pytest.raises(PowertrainError, match=rf"out of GPU memory for {says}") as raised:
        Engine.from_checkpoint(tiny_model_dir("llama"), config)
    assert "2.50 GiB asked for, 1.06 GiB of 79.19 GiB free" in str(raised.value)


def test_a_largest_step_that_does_not_fit_names_the_setting(models, monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr("powertrain.engine.memory.AttentionStep", run_out)
    with pytest.raises(PowertrainError, match=r"out of GPU memory for the largest step .*--max-num-batched-tokens"):
        engine_memory._cuda_budget(models("llama"), EngineConfig(), 64)


def test_random_weights_that_do_not_fit_name_the_setting(tiny_model_dir, monkeypatch):
    monkeypatch.setattr("powertrain.checkpoint.load.random_model", run_out)
    with pytest.raises(PowertrainError, match="out of GPU memory for the weights"):
        random_decoder(tiny_model_dir("llama"), EngineConfig(device="cpu", kernels="reference", dtype="float32"))


def test_graphs_that_do_not_fit_name_the_setting(models, monkeypatch):
    """A capture that is cut short ends with an error of its own."""

    class Capturing(Runner):
        @staticmethod
        def can_launch(plan):
            return False

        def compile(self):
            pass

        def capture(self):
            try:
                run_out()
            finally:
                raise torch.AcceleratorError("operation failed due to a previous error during capture")

    for name in ("Runner", "GpuRunner"):
        monkeypatch.setattr(f"powertrain.engine.core.{name}", Capturing)
    engine = engine_of(models("llama"))
    with pytest.raises(PowertrainError, match=r"out of GPU memory for the graphs .*--gpu-memory-utilization"):
        engine.warm_up()


def test_the_start_logs_who_runs_each_op_once(models, caplog):
    caplog.set_level(logging.DEBUG, "powertrain.engine.core")
    engine_of(models("llama")).warm_up()
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("add_rms_norm: reference (not triton: ") for line in lines)
    assert len(lines) == len({line.split(":")[0] for line in lines}) >= 6
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}


def test_other_errors_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shapes"), must_fit("x", "y"):
        raise RuntimeError("shapes")
    with pytest.raises(PowertrainError, match=r"^out of GPU memory for x: y$"), must_fit("x", "y"):
        raise torch.OutOfMemoryError("another allocator's words")


def test_a_lost_device_is_not_taken_for_a_bad_request(models, monkeypatch):
    engine = engine_of(models("llama"))
    engine.add(request("a", [5, 6, 7], max_tokens=4))

    def lose(plan):
        raise torch.AcceleratorError("device-side assert triggered")

    monkeypatch.setattr(engine.runner, "execute", lose)
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_a_nan_row_ends_one_request_only(models, monkeypatch):
    engine = engine_of(models("llama"))
    expected = run(engine_of(models("llama")), [request("b", [9] * 5, max_tokens=6)])["b", 0][0]
    true_logits = engine.model.logits

    def poisoned(hidden):
        logits = true_logits(hidden).clone()
        if logits.shape[0] == 2:
            logits[0] = torch.nan
        return logits

    monkeypatch.setattr(engine.model, "logits", poisoned)
    done = run(engine, [request("a", [5] * 5, max_tokens=6), request("b", [9] * 5, max_tokens=6)])
    assert done["a", 0][1] is FinishReason.ERROR
    assert done["b", 0][0] == expected


def test_stats_agree_with_what_was_asked(models):
    engine = engine_of(models("llama"))
    run(engine, [request("a", [5] * 20, max_tokens=7), request("b", [6] * 20, max_tokens=3)])
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (40, 10)
    assert (stats.num_running, stats.num_waiting) == (0, 0)


def test_speculation_on_a_trained_model_changes_nothing(stories260k_dir):
    """100 prompts, greedy: n-gram drafts on = off, token for token."""
    model = load_model(open_checkpoint(stories260k_dir), "cpu", torch.float32)
    texts = [[1, *prompt] for prompt in prompts(100, 512, longest=20)]
    for at, text in enumerate(texts):
        if at % 2:
            text.extend(text[-12:])  # something to look up
    plain = run(engine_of(model, num_blocks=800), [request(str(at), p, max_tokens=48) for at, p in enumerate(texts)])
    engine = engine_of(model, num_blocks=800, num_speculative_tokens=4)
    fast = run(engine, [request(str(at), p, max_tokens=48) for at, p in enumerate(texts)])
    ties = sum(count_ties(model, texts[int(key[0])], plain[key][0], fast[key][0]) for key in plain)
    print(f"{ties} ties in {48 * 100} tokens")
    assert ties <= 0.003 * 48 * 100
    assert engine.stats().accepted_draft_tokens > 100
