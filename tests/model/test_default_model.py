"""The long proofs on the default model: logits, teacher-forced greedy, batches, speculation. Minutes: marked `big`."""

from __future__ import annotations

import gzip
import random

import pytest
import torch
import transformers

from powertrain.checkpoint.load import load_model
from powertrain.checkpoint.source import open_checkpoint
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.config import EngineConfig
from powertrain.engine.core import Engine
from powertrain.types import Request, SamplingParams

pytestmark = [pytest.mark.big, pytest.mark.timeout(3600)]
TIE = 1e-3


@pytest.fixture(scope="module")
def ours(smollm2_gguf):
    return load_model(open_checkpoint(smollm2_gguf), "cpu", torch.float32)


@pytest.fixture(scope="module")
def theirs(smollm2_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(smollm2_gguf, shared_dir):
    """100 prompts of 8 to 96 tokens cut from WikiText-2, every third with a shared beginning."""
    with gzip.open(shared_dir / "data" / "wikitext2" / "wiki.test.raw.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    ids = load_tokenizer(smollm2_gguf).encode(text[:400_000])
    rng = random.Random(7)
    shared = ids[1000:1040]
    made = []
    for at in range(100):
        start = rng.randrange(2000, len(ids) - 200)
        own = ids[start : start + rng.randint(8, 96)]
        made.append(shared[: rng.choice((16, 33, 40))] + own if at % 3 == 0 else own)
    return made


def greedy(engine, prompts, num_tokens):
    for at, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        engine.add(Request(request_id=str(at), prompt_token_ids=tuple(prompt), sampling=sampling))
    done = {str(at): [] for at in range(len(prompts))}
    while engine.has_work():
        for output in engine.step():
            done[output.request_id].extend(output.token_ids)
    engine.scheduler.check()
    assert engine.stats().num_blocks_in_use == 0
    return [done[str(at)] for at in range(len(prompts))]


def engine_of(model, **options):
    return Engine(model, EngineConfig.from_options(device="cpu", **options), "smollm2")


def count_ties(model, prompts, left, right):
    """How many texts part at a near tie of the model's two best tokens; any other difference fails."""
    ties = 0
    for prompt, a, b in zip(prompts, left, right, strict=True):
        if a == b:
            continue
        at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        top = model.score(torch.tensor([*prompt, *a[:at]]))[-1].topk(2).values
        assert top[0] - top[1] < TIE
        ties += 1
    return ties


def test_logits_equal_transformers(ours, theirs, prompts):
    worst = 0.0
    for prompt in prompts[:10]:
        ids = torch.tensor(prompt)
        with torch.inference_mode():
            expected = theirs(ids.unsqueeze(0)).logits[0].float()
        for chunk in (512, 16):
            worst = max(worst, (ours.score(ids, chunk=chunk) - expected).abs().max().item())
    print(f"largest logit difference {worst:.2e}")
    assert worst < 1e-3


def test_greedy_is_transformers_argmax_at_every_position(ours, theirs, prompts):
    """50 prompts, 64 tokens each, teacher-forced through transformers."""
    texts = prompts[:50]
    outputs = greedy(engine_of(ours), texts, 64)
    ties = 0
    for prompt, tokens in zip(texts, outputs, strict=True):
        with torch.inference_mode():
            logits = theirs(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
        best = logits.topk(2).values
        chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        for at in (chosen != best[:, 0]).nonzero().flatten().tolist():
            assert best[at, 0] - chosen[at] < TIE
            ties += 1
    print(f"{ties} ties under {TIE} in {50 * 64} positions")
    assert ties <= 10


def test_batches_and_speculation_change_nothing(ours, prompts):
    """100 prompts alone = in a full, chunked, preempted, prefix-cached batch, with and without drafts."""
    num_tokens = 48
    alone = [greedy(engine_of(ours, enable_prefix_caching=False, num_blocks=16), [p], num_tokens)[0] for p in prompts]
    for drafts in (None, 4):
        engine = engine_of(
            ours, num_blocks=72, max_num_batched_tokens=96, max_num_seqs=16, num_speculative_tokens=drafts
        )
        together = greedy(engine, prompts, num_tokens)
        stats = engine.stats()
        assert stats.num_preemptions > 0
        assert stats.prefix_cache_hits > 0
        ties = count_ties(ours, prompts, alone, together)
        accepted = f"{stats.accepted_draft_tokens} of {stats.draft_tokens} drafts accepted"
        print(f"{ties} ties in {100 * num_tokens} tokens, {stats.num_preemptions} preemptions, {accepted}")
        assert ties <= 0.003 * 100 * num_tokens
