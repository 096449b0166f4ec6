"""Tokenizers on disk: read from a Hugging Face folder or a GGUF file, written out for a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from powertrain.tokenizer import Tokenizer
from powertrain.tokenizer_gguf import tokenizer_from_gguf
from powertrain.types import ModelFileError

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model: a `.gguf` file, a folder holding one, or a folder with `tokenizer.json`.

    Raises `ModelFileError` naming the file and what is wrong with it.
    """
    path = Path(path)
    gguf = _gguf_file(path)
    return tokenizer_from_folder(path) if gguf is None else _gguf_tokenizer(gguf)


def hugging_face_files(path: str | Path) -> dict[str, bytes]:
    """The tokenizer of the model at `path` as files of a Hugging Face folder, by name.

    A folder's own files are copied as they are; a GGUF file's tokenizer is written as `tokenizer.json` and
    `tokenizer_config.json`.
    """
    path = Path(path)
    gguf = _gguf_file(path)
    if gguf is None:
        return {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
    tokenizer = _gguf_tokenizer(gguf)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= tokenizer.special_tokens
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template.source
    return {
        "tokenizer.json": tokenizer.backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def _gguf_file(path: Path) -> Path | None:
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_dir() and not (path / "tokenizer.json").exists():
        ggufs = sorted(path.glob("*.gguf"))
        return ggufs[0] if len(ggufs) == 1 else None
    return None


def _gguf_tokenizer(path: Path) -> Tokenizer:
    from powertrain.checkpoint.gguf import GGUFCheckpoint

    metadata = GGUFCheckpoint(path).metadata
    try:
        return tokenizer_from_gguf(metadata)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def tokenizer_from_folder(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    `tokenizer.json` is the vocabulary and its rules; `tokenizer_config.json` and `special_tokens_map.json` name the
    special tokens; the template is `chat_template.jinja` or the config's. Replies end at the tokenizer's EOS and at
    those of `generation_config.json` (`config.json` where that is absent).
    """
    path = Path(path)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelFileError(f"{path}: no tokenizer.json; save the model's fast tokenizer there")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelFileError(f"{file}: not a tokenizer: {error}") from error
    config = _read_json(path / "tokenizer_config.json")
    special_tokens = _special_tokens({**_read_json(path / "special_tokens_map.json"), **config})
    known = [token for token in special_tokens.values() if backend.token_to_id(token) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in known])
    try:
        return Tokenizer(
            backend,
            special_tokens=special_tokens,
            eos_token_ids=_eos_token_ids(path),
            chat_template=_chat_template(path, config),
        )
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path}: must hold a JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in SPECIAL_TOKEN_NAMES:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _eos_token_ids(path: Path) -> list[int]:
    generation = _read_json(path / "generation_config.json")
    config = generation if "eos_token_id" in generation else _read_json(path / "config.json")
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise ModelFileError(f"{path}: eos_token_id must be an integer or a list of integers, got {ids!r}")
    return ids


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{file}: not UTF-8 text: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name: [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelFileError(f"{path}: chat_template in tokenizer_config.json must be a string")
    return template
