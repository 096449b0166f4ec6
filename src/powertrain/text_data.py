"""Text to calibrate on and to judge by: files of text or JSON lines to token ids, and token ids to windows."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from powertrain.types import PowertrainError

if TYPE_CHECKING:
    from powertrain.tokenizer import Tokenizer

# Fields of a JSON line that make up its text, and what stands between them; the first entry that fits is used.
_FIELDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("prompt", "response"), "\n"),
    (("prompt", "completion"), ""),
    (("prompt", "canonical_solution"), ""),
    (("question", "answer"), "\n"),
    (("instruction", "output"), "\n"),
    (("context", "continuation"), " "),
    (("text",), ""),
    (("content",), ""),
    (("prompt",), ""),
)


@dataclass(frozen=True, slots=True)
class Window:
    """A run of token ids to score as one sequence; the first `num_context` (at least 1) are given, not predicted."""

    token_ids: tuple[int, ...]
    num_context: int = 1

    @property
    def num_scored(self) -> int:
        return len(self.token_ids) - self.num_context


def read_texts(path: str | Path) -> list[str]:
    """The documents of a UTF-8 file, `.gz` unpacked: `.jsonl` and `.json` have one per line, any other file is one.

    A JSON line holds `text`, `prompt` and `response`, `question` and `answer`, or another pair of the table above.
    Raises `PowertrainError` naming the file, and the line at fault.
    """
    path = Path(path)
    content = read_utf8(path, "give `self` or a .txt or .jsonl file")
    name = path.name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".json")):
        texts = [content]
    else:
        lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
        texts = [_text_of(line, f"{path}:{number}") for number, line in lines]
    if not any(text.strip() for text in texts):
        raise PowertrainError(f"{path}: holds no text")
    return texts


def read_utf8(path: Path, hint: str) -> str:
    """The text of a UTF-8 file, `.gz` unpacked. Raises `PowertrainError` with `hint` if it cannot be read."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            return stream.read().decode("utf-8")
    except UnicodeDecodeError:
        raise PowertrainError(f"{path}: not UTF-8 text; give a .txt or .jsonl file (maybe .gz)") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PowertrainError(f"{path}: cannot be read ({reason}); {hint}") from None


def _text_of(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError:
        raise PowertrainError(f"{where}: not a line of JSON") from None
    if isinstance(row, dict):
        for fields, separator in _FIELDS:
            if all(isinstance(row.get(field), str) for field in fields):
                return separator.join(row[field] for field in fields)
    known = "; ".join(" + ".join(fields) for fields, _ in _FIELDS)
    raise PowertrainError(f"{where}: none of the known fields stands there as text: {known}")


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """One run of ids: special tokens as the tokenizer adds them, EOS between documents where there is one."""
    separator = list(tokenizer.eos_token_ids[:1])
    ids: list[int] = []
    for index, text in enumerate(texts):
        ids.extend(separator if index else [])
        ids.extend(tokenizer.encode(text))
    return ids


def windows_of(token_ids: Sequence[int], window: int, stride: int | None = None) -> list[Window]:
    """Cut a run of ids into windows that start every `stride` (default: `window`) tokens, the last one maybe shorter.

    With a smaller stride every window predicts only the tokens that no earlier one did.
    """
    stride = stride or window
    if window < 2 or not 1 <= stride <= window:
        raise PowertrainError(f"window must be at least 2 and stride within it, got window {window}, stride {stride}")
    windows = []
    previous_end = 0
    for begin in range(0, len(token_ids), stride):
        end = min(begin + window, len(token_ids))
        num_context = max(1, previous_end - begin)
        if end - begin > num_context:
            windows.append(Window(tuple(token_ids[begin:end]), num_context))
        previous_end = end
        if end == len(token_ids):
            break
    return windows


def spread(windows: Sequence[Window], num_tokens: int | None) -> list[Window]:
    """About `num_tokens` worth of full windows, evenly spaced over all of them (all if None)."""
    longest = max(len(window.token_ids) for window in windows)
    full = [window for window in windows if len(window.token_ids) == longest]
    if num_tokens is None:
        return full
    num_windows = min(len(full), max(1, num_tokens // longest))
    return [full[index] for index in np.linspace(0, len(full) - 1, num_windows).round().astype(int)]


def token_sha256(windows: Sequence[Window]) -> str:
    """SHA-256 of all ids as little-endian int32: two runs with the same hash scored the same tokens."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(np.asarray(window.token_ids, dtype="<i4").tobytes())
    return digest.hexdigest()
