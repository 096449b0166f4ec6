"""`/v1/chat/completions` with the openai client, and the routes around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import ServerProcess, events

HELLO: Any = [{"role": "user", "content": "How far can I go today?"}]


@pytest.fixture(scope="module")
def ai(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30) as client:
        yield client


def test_models(ai: openai.OpenAI, client: httpx.Client) -> None:
    (model,) = ai.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "powertrain")
    assert model.created > 1_700_000_000
    assert model.model_dump()["max_model_len"] == 512
    assert ai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        ai.models.retrieve("org/other")
    assert error.value.param == "model"


def test_sync_client(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=6, temperature=0, extra_body={"ignore_eos": True}
    )
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer._request_id


def test_sync_stream(ai: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    whole = ai.chat.completions.create(**request)
    chunks = list(ai.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    content = [chunk for chunk in chunks if chunk.choices]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in content) == whole.choices[0].message.content
    assert content[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in content[1:]] == [None] * (len(content) - 1)
    assert content[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage or chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


async def test_async_client_and_stream(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=30) as ai:
        request: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0}
        whole = await ai.chat.completions.create(**request)
        text = ""
        async for chunk in await ai.chat.completions.create(**request, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == whole.choices[0].message.content
        completion = await ai.completions.create(model="tiny", prompt="Once upon a time", max_tokens=4)
        assert completion.choices[0].finish_reason in ("length", "stop")


def test_error_classes(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ai.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ai.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"


def test_logprobs(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    for entry in logprobs.content:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy: the chosen one is the likeliest
        assert entry.bytes is not None
        if not entry.token.startswith("bytes:"):
            assert bytes(entry.bytes).decode() == entry.token


def test_n_and_stream_of_n(ai: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 8,
        "n": 3,
        "seed": 3,
        "temperature": 1.4,
    }
    whole = ai.chat.completions.create(**request)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = ["", "", ""]
    roles = [0, 0, 0]
    for chunk in ai.chat.completions.create(**request, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        roles[chunk.choices[0].index] += chunk.choices[0].delta.role is not None
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == [1, 1, 1]


def test_budget_is_the_context_unless_told(client: httpx.Client) -> None:
    body = {"messages": HELLO, "temperature": 0, "ignore_eos": True}
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["total_tokens"] == 512
    both = {**body, "max_tokens": 9, "max_completion_tokens": 3}
    assert client.post("/v1/chat/completions", json=both).json()["usage"]["completion_tokens"] == 3


def test_prompt_is_the_template(client: httpx.Client) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    chat = client.post("/tokenize", json={"messages": messages}).json()
    text = "<s><|system|>Be brief.</s><|user|>Hi</s><|assistant|>"
    plain = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert chat["tokens"] == plain["tokens"]
    assert "".join(plain["token_strs"]) == text
    answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens"] == chat["count"] == len(chat["tokens"])


def test_continue_final_message(client: httpx.Client) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The sun said"}]
    ids = client.post(
        "/tokenize", json={"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    ).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text.endswith("<|assistant|>The sun said")


def test_tokenize_round_trip(client: httpx.Client) -> None:
    text = "café 東京 \U0001f600"
    answer = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 512
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_harmless_fields_are_taken_and_unknown_ones_named(client: httpx.Client) -> None:
    harmless = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "priority": 0,
        "stop": None,
        "logprobs": None,
        "seed": None,
    }
    answer = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1, **harmless})
    assert answer.status_code == 200, answer.text
    assert "x-powertrain-ignored" not in answer.headers
    odd = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1, "top_q": 1, "x\r\ny": 2})
    assert odd.status_code == 200
    assert odd.headers["x-powertrain-ignored"] == "top_q"


def test_request_id_is_echoed_or_made(client: httpx.Client) -> None:
    assert client.get("/version", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = client.get("/version", headers={"x-request-id": "no spaces allowed"}).headers["x-request-id"]
    assert made != "no spaces allowed"
    assert len(made) == 32


def test_first_event_has_role_and_token(client: httpx.Client) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "temperature": 0, "stream": True, "logit_bias": {"70": 100}}
    first = events(client.post("/v1/chat/completions", json=body).text)[0]
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["choices"][0]["delta"]["content"]


def test_openapi_describes_the_bodies(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "prompt" in schema["required"]
