"""A strict JSON reader for request bodies: what a careless parser would let through is refused with a reason.

Refused: invalid UTF-8, NaN and Infinity, numbers no float holds, integers of absurd length, duplicate keys, lone
surrogates, deep nesting, and any top-level value that is not an object.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from powertrain.types import InvalidRequest

MAX_DEPTH = 32
"""Deepest nesting of lists and objects; OpenAI requests need six."""
MAX_INT_DIGITS = 20
"""64-bit integers have at most 20 characters; longer ones are an attack on the parser, not a value."""


def parse_json_object(body: bytes) -> dict[str, Any]:
    """`body` as a dict. Raises `InvalidRequest` saying what is wrong, whatever the bytes."""
    if not body.strip():
        raise InvalidRequest("the request body is empty; send a JSON object")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the request body is not valid UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
            object_pairs_hook=_unique_keys,
        )
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the request body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise InvalidRequest(f"the request body is nested deeper than {MAX_DEPTH} levels") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the request body must be a JSON object")
    _check_tree(value, may_hold_surrogates="\\u" in text)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"{name} is not a JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_INT_DIGITS:
        raise InvalidRequest(f"an integer of {len(digits)} digits is too large")
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise InvalidRequest(f"the number {digits[:40]} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidRequest(f"the key {key[:80]!a} appears twice in one object")
            seen.add(key)
    return result


def _check_tree(root: dict[str, Any], may_hold_surrogates: bool) -> None:
    """Walk level by level, without recursion: nesting depth and, where escapes could hide them, lone surrogates."""
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            values = node.values() if isinstance(node, dict) else node
            if may_hold_surrogates:
                _check_strings(node)
            below.extend(value for value in values if isinstance(value, (dict, list)))
        if not below:
            return
        level = below
    raise InvalidRequest(f"the request body is nested deeper than {MAX_DEPTH} levels")


def _check_strings(node: dict[str, Any] | list[Any]) -> None:
    strings = [*node.keys(), *node.values()] if isinstance(node, dict) else node
    for value in strings:
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise InvalidRequest("a string holds a lone surrogate, which is no character") from None
