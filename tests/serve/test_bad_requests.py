"""What a client can get wrong: each gets its status and an error body naming the field, and harms nobody else."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

GOOD = {"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
HELLO = [{"role": "user", "content": "Hello"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def good_text(client: httpx.Client) -> str:
    return str(client.post(COMPLETIONS, json=GOOD).json()["choices"][0]["text"])


def check(answer: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["param"] == param, error
    return error


def check_alive(client: httpx.Client, good_text: str) -> None:
    assert client.get("/health").status_code == 200
    assert client.post(COMPLETIONS, json=GOOD).json()["choices"][0]["text"] == good_text


HUGE = 2**63

FIELDS: list[tuple[str, Any]] = [
    *[("n", value) for value in (0, -1, 17, 10**9, HUGE, 1.5, "2", True)],
    *[("max_tokens", value) for value in (0, -1, 10**9, HUGE, 1.5, "8")],
    *[("min_tokens", value) for value in (-1, 10**9, 7)],
    *[("temperature", value) for value in (-0.1, 101, "hot", HUGE)],
    *[("top_p", value) for value in (0, -1, 1.01)],
    *[("top_k", value) for value in (-2, 321, HUGE, 1.5)],
    *[("min_p", value) for value in (-0.1, 1.1)],
    *[("repetition_penalty", value) for value in (0, -1, 1e9)],
    *[("presence_penalty", value) for value in (-2.1, 2.1)],
    *[("frequency_penalty", value) for value in (-2.1, 1e300)],
    *[("seed", value) for value in (HUGE, "1", 0.5)],
    *[("prompt_logprobs", value) for value in (-1, 21, 320)],
    *[("stop", value) for value in (1, [1], [""], "", ["x"] * 17, {"a": 1})],
    *[("stop_token_ids", value) for value in ([-1], [320], [HUGE], ["a"], 5)],
    *[("ignore_eos", value) for value in (1, "true")],
    *[("cache_salt", value) for value in (1, ["a"])],
    *[("stream", value) for value in (1, "yes")],
    *[("stream_options", value) for value in ({"include_usage": True}, [], {"include_usage": 1})],
    *[("logit_bias", {key: 1.0}) for key in ("-1", "320", "99999999999999999999", "a", "1.0", "")],
    *[("logit_bias", value) for value in ({"5": 101}, {"5": -101}, {"5": "x"}, [5])],
    *[("tools", value) for value in ([{"type": "function", "function": {"name": "f"}}], {}, "x")],
    *[("tool_choice", value) for value in ("required", {"type": "function", "function": {"name": "f"}})],
    *[("response_format", {"type": kind}) for kind in ("json_object", "json_schema", "other")],
    *[("functions", [{"name": "f"}]), ("function_call", {"name": "f"})],
    *[("structured_outputs", {"json": {}}), ("guided_json", {}), ("guided_regex", "(a+)+$"), ("grammar", "x")],
    *[("chat_template", "{% for i in range(10**9) %}{% endfor %}"), ("chat_template_kwargs", {"tokenize": False})],
    *[("prompt_embeds", "AAAA"), ("audio", {"voice": "a"}), ("modalities", ["audio"]), ("documents", [{}])],
    *[("reasoning_effort", "low"), ("priority", 1), ("priority", False), ("store", True), ("service_tier", "flex")],
    *[("use_beam_search", True), ("bad_words", ["x"]), ("allowed_token_ids", [1]), ("n_discard", -1)],
    *[("truncate_prompt_tokens", 5), ("logits_processors", ["x"]), ("web_search_options", {}), ("prediction", {})],
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_every_bad_value_names_its_field(client: httpx.Client, good_text: str, path: str) -> None:
    base: dict[str, Any] = {"prompt": "Hello"} if path == COMPLETIONS else {"messages": HELLO}
    for field, value in FIELDS:
        more = {"max_tokens": 6} if field == "min_tokens" else {}
        answer = client.post(path, json={**base, **more, field: value})
        try:
            check(answer, 400, field)
        except AssertionError as error:
            raise AssertionError(f"{field}={value!r}: {error}") from None
    check_alive(client, good_text)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [320]}, "prompt"),
        ({"prompt": [HUGE]}, "prompt"),
        ({"prompt": [[5, 6], [-7]]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": [5] * 512}, "prompt"),
        ({"prompt": "word " * 50_000}, "prompt"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
        ({"prompt": "a", "logprobs": 320}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "best_of": 10**9}, "best_of"),
        ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": ["a"] * 200, "n": 16}, "prompt"),
    ],
)
def test_bad_completions(client: httpx.Client, good_text: str, body: dict[str, Any], param: str) -> None:
    check(client.post(COMPLETIONS, json=body), 400, param)
    check_alive(client, good_text)


def test_too_long_tells_both_lengths(client: httpx.Client) -> None:
    message = check(client.post(COMPLETIONS, json={"prompt": [5] * 600}), 400, "prompt")["message"]
    assert "600" in message
    assert "512" in message
    message = check(client.post(COMPLETIONS, json={"prompt": [5] * 500, "max_tokens": 13}), 400, "max_tokens")[
        "message"
    ]
    assert "500" in message
    assert "13" in message
    chat = {"messages": HELLO, "max_completion_tokens": 600}
    check(client.post(CHAT, json=chat), 400, "max_completion_tokens")
    check(client.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 600}]}), 400, "messages")
    assert client.post(COMPLETIONS, json={"prompt": [5] * 500, "max_tokens": 12}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": 5}, "logprobs"),
        ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
        (
            {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
    ],
)
def test_bad_chats(client: httpx.Client, good_text: str, body: dict[str, Any], param: str) -> None:
    check(client.post(CHAT, json=body), 400, param)
    check_alive(client, good_text)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b'"text"',
        b"5",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": 1e400}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "seed": ' + b"1" * 10_000 + b"}",
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "x": ' + b'{"y":' * 1000 + b"1" + b"}" * 1001,
    ],
)
def test_bad_json(client: httpx.Client, good_text: str, body: bytes) -> None:
    answer = client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    check(answer, 400, None)
    check_alive(client, good_text)


def test_wrong_media_types(client: httpx.Client) -> None:
    body = json.dumps(GOOD).encode()
    for content_type in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""):
        check(client.post(COMPLETIONS, content=body, headers={"content-type": content_type}), 415, None)
    for encoding in ("gzip", "br", "identity, gzip"):
        headers = {"content-type": "application/json", "content-encoding": encoding}
        check(client.post(COMPLETIONS, content=body, headers=headers), 415, None)
    headers = {"content-type": "application/json; charset=utf-8"}
    assert client.post(COMPLETIONS, content=body, headers=headers).status_code == 200


def test_unknown_routes_methods_and_models(client: httpx.Client) -> None:
    check(client.get("/nowhere"), 404, None)
    check(client.get("/v1/models/x"), 404, "model")
    check(client.get(COMPLETIONS), 405, None)
    check(client.delete("/v1/models"), 405, None)
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HELLO}), ("/tokenize", {"prompt": "a"})):
        error = check(client.post(path, json={**body, "model": "other"}), 404, "model")
        assert error["code"] == "model_not_found"
        check(client.post(path, json={**body, "model": 5}), 400, "model")


def test_bad_tokenize_and_detokenize(client: httpx.Client) -> None:
    check(client.post("/tokenize", json={}), 400, "prompt")
    check(client.post("/tokenize", json={"prompt": "a", "messages": HELLO}), 400, "prompt")
    check(client.post("/tokenize", json={"messages": []}), 400, "messages")
    check(client.post("/tokenize", json={"prompt": 5}), 400, "prompt")
    for tokens in ([-1], [320], [HUGE], [1.5], "a", None):
        check(client.post("/detokenize", json={"tokens": tokens}), 400, "tokens")


def test_unknown_stream_options(client: httpx.Client) -> None:
    stream = {**GOOD, "stream": True}
    check(
        client.post(COMPLETIONS, json={**stream, "stream_options": {"include_obfuscation": True}}),
        400,
        "stream_options",
    )
    assert client.post(COMPLETIONS, json={**stream, "stream_options": {"include_obfuscation": False}}).is_success


def test_errors_of_streams_come_before_the_stream(client: httpx.Client) -> None:
    check(client.post(COMPLETIONS, json={**GOOD, "stream": True, "prompt": [320]}), 400, "prompt")


def test_extreme_but_legal_sampling(client: httpx.Client, good_text: str) -> None:
    """Nothing here may give a NaN, to this request or to others."""
    extremes: list[dict[str, Any]] = [
        {"temperature": 100.0},
        {"temperature": 1e-300},
        {"top_p": 1e-300},
        {"repetition_penalty": 100.0},
        {"repetition_penalty": 1e-300},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"logit_bias": {str(i): -100.0 for i in range(320)}},
        {"min_p": 1.0},
        {"top_k": 320},
        {"top_k": -1},
        {"seed": -(2**63)},
        {"logprobs": 20, "echo": True},
    ]
    for extreme in extremes:
        answer = client.post(COMPLETIONS, json={**GOOD, "temperature": 1.0, **extreme})
        assert answer.status_code == 200, f"{extreme}: {answer.text}"
        assert answer.json()["usage"]["completion_tokens"] == 6
    check_alive(client, good_text)
