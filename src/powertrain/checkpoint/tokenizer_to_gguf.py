"""A Hugging Face tokenizer as GGUF metadata, the reverse of `tokenizer_gguf.py`, checked by reading it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.tokenizer import SPACE, Tokenizer
from powertrain.tokenizer_gguf import (
    BYTE,
    CONTROL,
    PRE_TOKENIZERS,
    PREFIX,
    UNKNOWN,
    USER_DEFINED,
    WHOLE_WORD_NAMES,
    tokenizer_from_gguf,
)
from powertrain.types import ModelFileError

NORMAL, UNUSED = 1, 5
PROBE = (
    "The quick brown fox, 1234567 times; it's 3.14%\n\n\n  indented\tcode = {'x': [1, 2]}  # \u00fcber na\u00efve "
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \u0420\u0443\u0441\u0441\u043a\u0438\u0439 \U0001f600\U0001f680 "
    "WE'LL they'd\r\nend   "
)
"""Words, digits, spaces, scripts and signs at which the ways of splitting text part."""


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys of the tokenizer in `folder`, with names for unused rows up to `vocab_size`.

    Raises `ModelFileError` where it is of a kind that GGUF has no name for, or would split text otherwise there.
    """
    tokenizer = load_tokenizer(folder)
    state = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise ModelFileError(f"{folder}: a tokenizer of type {model.get('type')} cannot be written to GGUF; BPE can")
    tokens, types = _tokens(folder, tokenizer, vocab_size)
    own = _sentencepiece(state, tokens) if model.get("byte_fallback") else _byte_level(folder, state)
    made = {"tokens": tokens, "token_type": types, **own, **_special_ids(tokenizer)}
    metadata = {PREFIX + key: value for key, value in made.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template.source
    _check(folder, tokenizer, metadata)
    return metadata


def _tokens(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    ids = tokenizer.backend.get_vocab(with_added_tokens=True)
    if ids and max(ids.values()) >= vocab_size:
        raise ModelFileError(f"{folder}: the tokenizer has ids up to {max(ids.values())}, the model {vocab_size} rows")
    tokens = [f"[PAD{token_id}]" for token_id in range(vocab_size)]
    types = [UNUSED] * vocab_size
    unknown = tokenizer.special_tokens.get("unk_token")
    has_bytes = json.loads(tokenizer.backend.to_str())["model"].get("byte_fallback")
    for token, token_id in ids.items():
        is_byte = has_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[token_id], types[token_id] = token, BYTE if is_byte else NORMAL
    for token_id, added in tokenizer.backend.get_added_tokens_decoder().items():
        types[token_id] = CONTROL if added.special else USER_DEFINED
        if has_bytes and added.content == unknown:
            types[token_id] = UNKNOWN
    return tokens, types


def _merges(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs in order of rank; older files write them as one string."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in state["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def _byte_level(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    wanted = _without_offsets(state.get("pre_tokenizer"))
    names = [
        name for name, make in PRE_TOKENIZERS.items() if _without_offsets(json.loads(make().__getstate__())) == wanted
    ]
    normalizer = (state.get("normalizer") or {}).get("type")
    wholes = bool(state["model"].get("ignore_merges"))
    names = [name for name in names if ("NFC" if name == "qwen2" else None) == normalizer]
    names = [name for name in names if (name in WHOLE_WORD_NAMES) == wholes]
    if not names:
        raise ModelFileError(
            f"{folder}: its way of splitting text has no GGUF name; known: {', '.join(PRE_TOKENIZERS)}"
        )
    merges = [" ".join(pair) for pair in _merges(state)]
    return {"model": "gpt2", "pre": names[-1], "merges": merges}


def _without_offsets(part: Any) -> Any:
    """A pre-tokenizer's state without what changes no token."""
    if isinstance(part, dict):
        return {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    return [_without_offsets(value) for value in part] if isinstance(part, list) else part


def _sentencepiece(state: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Pieces score by the rank of the first merge that makes them; what no merge makes comes after all of them."""
    merges = _merges(state)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(merges) + token_id)) for token_id, token in enumerate(tokens)]
    normalizer, pre = state.get("normalizer") or {}, state.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *pre.get("pretokenizers", [pre])]
    adds_space = any(
        (step.get("type") == "Prepend" and step.get("prepend") == SPACE)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
    return {"model": "llama", "scores": scores, "add_space_prefix": adds_space}


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    names = {"bos_token": "bos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: tokenizer.backend.token_to_id(tokenizer.special_tokens.get(name, "")) for name, key in names.items()}
    ends = dict(zip(("eos", "eot", "eom"), tokenizer.eos_token_ids, strict=False))
    found = {f"{key}_token_id": token_id for key, token_id in (ids | ends).items() if token_id is not None}
    bare, whole = (tokenizer.encode("a", add_special_tokens=adds) for adds in (False, True))
    return found | {
        "add_bos_token": len(whole) > len(bare) and whole[0] == tokenizer.bos_token_id,
        "add_eos_token": len(whole) > len(bare) and whole[-1] in tokenizer.eos_token_ids and whole[-1] != bare[-1],
    }


def _check(folder: Path, tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    """The file's own reader must split text as the original does."""
    read = tokenizer_from_gguf(metadata)
    if read.encode(PROBE) != tokenizer.encode(PROBE):
        raise ModelFileError(f"{folder}: its tokenizer would split text otherwise in a GGUF file, so none is written")
