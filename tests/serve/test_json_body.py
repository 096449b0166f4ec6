"""The strict JSON reader agrees with the standard one on what both accept, and refuses the rest with a reason."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powertrain.serve.json_body import MAX_DEPTH, parse_json_object
from powertrain.types import InvalidRequest

plain_text = st.text(st.characters(exclude_categories=("Cs",)))
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | plain_text,
    lambda inner: st.lists(inner) | st.dictionaries(plain_text, inner),
    max_leaves=20,
)


@settings(max_examples=60)
@given(st.dictionaries(plain_text, values), st.booleans())
def test_reads_what_json_writes(value: dict[str, object], ensure_ascii: bool) -> None:
    assert parse_json_object(json.dumps(value, ensure_ascii=ensure_ascii).encode()) == value


@given(st.binary(max_size=64))
def test_any_bytes_are_an_object_or_a_clean_refusal(body: bytes) -> None:
    try:
        value = parse_json_object(body)
    except InvalidRequest:
        return
    assert isinstance(value, dict)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e400}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": {"b": 1, "b": 1}}', "twice"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b'{"\\udfff": 1}', "lone surrogate"),
        (b'{"a": ["\\ud83d"]}', "lone surrogate"),
        (b'{"a": ' + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}", "nested"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        (b'{"a":' * 100_000, "nested"),
    ],
)
def test_refuses(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        parse_json_object(body)


def test_accepts_a_pair_of_surrogates_and_useful_depth() -> None:
    assert parse_json_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    depth = MAX_DEPTH - 2
    assert parse_json_object(b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
