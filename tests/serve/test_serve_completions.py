"""`/v1/completions` on a real engine: shapes, prompts, log-probabilities judged by transformers, streams."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from serving import events, metric, wait_until

TEXT = "Once upon a time there was a small engine"


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"temperature": 0, "max_tokens": 8, **body})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def tokens(client: httpx.Client, text: str) -> list[int]:
    ids: list[int] = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    return ids


def test_body_and_usage(client: httpx.Client) -> None:
    body = complete(client, prompt=TEXT, model="tiny", ignore_eos=True)
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "tiny"
    (choice,) = body["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(tokens(client, TEXT))
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


def test_cached_tokens_are_whole_blocks(client: httpx.Client) -> None:
    prompt = [7 + i % 200 for i in range(70)]
    salted = {"prompt": prompt, "cache_salt": "of this test"}
    assert complete(client, **salted)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert complete(client, **salted)["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
    assert complete(client, prompt=prompt, cache_salt="other")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_greedy_tokens_equal_transformers(client: httpx.Client, tiny_model_dir: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    prompt = tokens(client, TEXT)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    body = complete(
        client, prompt=prompt, max_tokens=12, ignore_eos=True, return_token_ids=True, logit_bias={"1": -100}
    )
    assert body["choices"][0]["token_ids"] == expected[0, len(prompt) :].tolist()
    assert body["choices"][0]["prompt_token_ids"] == prompt


def test_loglikelihood_as_evaluation_harnesses_ask_for_it(
    client: httpx.Client, tiny_model_dir: Callable[[str], Path]
) -> None:
    """A batch of token lists, `max_tokens` 1, echo, logprobs 1: arrays over prompt + 1, first entry null."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    prompts = [tokens(client, TEXT), tokens(client, "Numbers: 0 1 2 3 4 5")]
    body = complete(client, prompt=prompts, max_tokens=1, echo=True, logprobs=1, seed=1, stop=None)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        shape = choice["logprobs"]
        assert {len(values) for values in shape.values()} == {len(prompt) + 1}
        assert shape["token_logprobs"][0] is None
        assert shape["top_logprobs"][0] is None
        with torch.no_grad():
            reference = torch.log_softmax(model(torch.tensor([prompt])).logits[0], dim=-1)
        for place in range(1, len(prompt)):
            chosen = shape["token_logprobs"][place]
            top = shape["top_logprobs"][place]
            assert chosen == pytest.approx(reference[place - 1, prompt[place]].item(), abs=1e-3)
            assert max(top.values()) == pytest.approx(reference[place - 1].max().item(), abs=1e-3)
            assert top[shape["tokens"][place]] == chosen  # the very same float
            is_greedy = prompt[place] == reference[place - 1].argmax().item()
            assert (chosen == max(top.values())) == is_greedy
        assert choice["text"].startswith(client.post("/detokenize", json={"tokens": prompt}).json()["prompt"])


def test_text_offsets_point_into_the_text(client: httpx.Client) -> None:
    (choice,) = complete(client, prompt=TEXT, echo=True, logprobs=0, max_tokens=4)["choices"]
    shape = choice["logprobs"]
    prompt_part = list(zip(shape["tokens"], shape["text_offset"], strict=True))[: len(tokens(client, TEXT))]
    assert all(choice["text"].startswith(token, offset) for token, offset in prompt_part)
    assert len(shape["top_logprobs"][-1]) == 1  # logprobs 0 still tells the chosen one


def test_echo_without_generation(client: httpx.Client) -> None:
    body = complete(client, prompt=TEXT, echo=True, max_tokens=0)
    assert body["choices"][0]["text"] == TEXT
    assert body["usage"]["completion_tokens"] == 0
    shape = complete(client, prompt=TEXT, echo=True, max_tokens=0, logprobs=1)["choices"][0]["logprobs"]
    assert len(shape["tokens"]) == len(tokens(client, TEXT))


def test_prompt_logprobs(client: httpx.Client) -> None:
    ids = tokens(client, TEXT)
    (choice,) = complete(client, prompt=TEXT, prompt_logprobs=2)["choices"]
    assert len(choice["prompt_logprobs"]) == len(ids)
    assert choice["prompt_logprobs"][0] is None
    for token_id, place in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True):
        assert str(token_id) in place
        assert 2 <= len(place) <= 3


def test_every_kind_of_prompt_gives_the_same(client: httpx.Client) -> None:
    ids = tokens(client, TEXT)
    texts = {
        kind: [choice["text"] for choice in complete(client, prompt=prompt)["choices"]]
        for kind, prompt in {"text": TEXT, "texts": [TEXT, TEXT], "ids": ids, "lists": [ids, ids]}.items()
    }
    assert texts["texts"] == texts["lists"] == texts["text"] * 2
    assert texts["ids"] == texts["text"]


def test_n_of_batched_prompts(client: httpx.Client) -> None:
    body = complete(client, prompt=[TEXT, "Numbers:"], n=3, temperature=1.5, seed=4, max_tokens=6, ignore_eos=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4, 5]
    assert len({choice["text"] for choice in body["choices"]}) > 3
    assert body["usage"]["prompt_tokens"] == len(tokens(client, TEXT)) + len(tokens(client, "Numbers:"))
    assert body["usage"]["completion_tokens"] == 36


def test_seed_repeats_and_differs(client: httpx.Client) -> None:
    def text(seed: int) -> str:
        return complete(client, prompt=TEXT, temperature=1.5, seed=seed, max_tokens=16)["choices"][0]["text"]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_logit_bias_forces_and_forbids(client: httpx.Client) -> None:
    forced = complete(client, prompt=TEXT, logit_bias={"70": 100}, return_token_ids=True, max_tokens=4)
    assert forced["choices"][0]["token_ids"] == [70] * 4


def test_stop_strings(client: httpx.Client) -> None:
    whole = complete(client, prompt=TEXT, max_tokens=40, logit_bias={"70": 20, "71": 19})["choices"][0]["text"]
    # Both letters are forced often; a stop that crosses tokens must never leak, not even its beginning.
    stop = whole[5:8]
    cut = complete(client, prompt=TEXT, max_tokens=40, logit_bias={"70": 20, "71": 19}, stop=[stop, "never"])
    (choice,) = cut["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    kept = complete(
        client, prompt=TEXT, max_tokens=40, logit_bias={"70": 20, "71": 19}, stop=stop, include_stop_str_in_output=True
    )
    assert kept["choices"][0]["text"] == choice["text"] + stop


def test_stop_ends_the_sequence_in_the_engine(client: httpx.Client) -> None:
    complete(client, prompt=TEXT, max_tokens=400, logit_bias={"70": 100}, stop="%")
    letter = client.post("/detokenize", json={"tokens": [70]}).json()["prompt"]
    body = complete(client, prompt=TEXT, max_tokens=400, logit_bias={"70": 100}, stop=letter * 3)
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 3
    wait_until(lambda: metric(client, "kv_cache_usage_perc") == 0, what="all blocks free")


def test_stop_token_ids_min_tokens_and_eos(client: httpx.Client) -> None:
    def run(**more: Any) -> dict[str, Any]:
        return complete(client, prompt=TEXT, logit_bias={"70": 100}, return_token_ids=True, **more)

    stopped = run(stop_token_ids=[70])["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"], stopped["text"]) == ("stop", 70, "")
    later = run(stop_token_ids=[70], min_tokens=3)["choices"][0]
    assert len(later["token_ids"]) >= 4
    eos = complete(client, prompt=TEXT, logit_bias={"1": 100})["choices"][0]
    assert (eos["finish_reason"], eos["stop_reason"], eos["text"]) == ("stop", None, "")
    ignored = complete(client, prompt=TEXT, logit_bias={"1": 100}, ignore_eos=True)
    assert ignored["usage"]["completion_tokens"] == 8
    special = complete(client, prompt=TEXT, logit_bias={"1": 100}, ignore_eos=True, skip_special_tokens=False)
    assert special["choices"][0]["text"] == "</s>" * 8


def test_default_budget_is_sixteen_and_fits(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={"prompt": TEXT, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 16
    nearly_full = client.post("/v1/completions", json={"prompt": [9] * 507, "ignore_eos": True}).json()
    assert nearly_full["usage"]["completion_tokens"] == 5


def stream(client: httpx.Client, **body: Any) -> list[Any]:
    answer = client.post("/v1/completions", json={"temperature": 0, "max_tokens": 8, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def test_stream_shape_and_usage(client: httpx.Client) -> None:
    chunks = stream(client, prompt=TEXT, ignore_eos=True, stream_options={"include_usage": True})
    *content, usage = chunks
    assert all(chunk["usage"] is None for chunk in content)
    assert [c["choices"][0]["finish_reason"] for c in content] == [None] * (len(content) - 1) + ["length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 8
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in stream(client, prompt=TEXT))


def test_continuous_usage(client: httpx.Client) -> None:
    chunks = stream(client, prompt=TEXT, ignore_eos=True, stream_options={"continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == list(range(1, 9))


def test_streamed_logprobs_and_echo_join_to_the_body(client: httpx.Client) -> None:
    request = {"prompt": TEXT, "echo": True, "logprobs": 2}
    (choice,) = complete(client, **request)["choices"]
    chunks = [chunk["choices"][0] for chunk in stream(client, **request)]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    for name, values in choice["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == values


def test_streams_of_n_do_not_mix(client: httpx.Client) -> None:
    request = {"prompt": [TEXT, "Numbers:"], "n": 2, "temperature": 1.3, "seed": 5, "max_tokens": 12}
    whole = [choice["text"] for choice in complete(client, **request)["choices"]]
    joined = ["", "", "", ""]
    for chunk in stream(client, **request):
        joined[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert joined == whole


def test_streamed_equals_not_streamed_for_200_prompts(client: httpx.Client) -> None:
    """Random byte-level tokens: most are parts of characters, so that a split character would show."""

    def both(number: int) -> bool:
        request = {
            "prompt": [5 + (number * 37 + i * i) % 300 for i in range(6)],
            "max_tokens": 20,
            "stop": ["a", "\ufffd\ufffd\ufffd"],
        }
        (choice,) = complete(client, **request)["choices"]
        chunks = [chunk["choices"][0] for chunk in stream(client, **request)]
        text = "".join(chunk["text"] for chunk in chunks)
        return text == choice["text"] and chunks[-1]["finish_reason"] == choice["finish_reason"]

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(both, range(200))) == 200
