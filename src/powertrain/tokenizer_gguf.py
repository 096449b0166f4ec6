"""A tokenizer out of GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`) vocabularies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from powertrain.tokenizer import SPACE, Tokenizer
from powertrain.types import ModelFileError

PREFIX = "tokenizer.ggml."
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # GGUF's token types

# The patterns published with the models' own tokenizers.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    whole_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), whole_bytes])


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama3": lambda: _split(LLAMA3_SPLIT),
    "llama-v3": lambda: _split(LLAMA3_SPLIT),
    "llama-bpe": lambda: _split(LLAMA3_SPLIT),
    "qwen2": lambda: _split(QWEN2_SPLIT),
    "deepseek-r1-qwen": lambda: _split(QWEN2_SPLIT),
    "tekken": lambda: _split(TEKKEN_SPLIT),
}
# These take a word that is in the vocabulary whole, even where no chain of merges leads to it, and add BOS by default.
WHOLE_WORD_NAMES = ("llama3", "llama-v3", "llama-bpe", "tekken")


class _Metadata:
    """Typed, checked access to the `tokenizer.ggml.*` keys."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.tokens: list[str] = self.array("tokens", str)
        self.types: list[int] = self.array("token_type", int, default=[1] * len(self.tokens))
        if not self.tokens:
            raise ModelFileError(f"{PREFIX}tokens is empty")
        if len(self.types) != len(self.tokens):
            raise ModelFileError(f"{PREFIX}token_type has {len(self.types)} entries for {len(self.tokens)} tokens")
        self.vocab = {token: token_id for token_id, token in enumerate(self.tokens)}
        if len(self.vocab) != len(self.tokens):
            raise ModelFileError(f"{PREFIX}tokens holds the same token twice")

    def text(self, key: str, default: str) -> str:
        return str(self._values.get(PREFIX + key, default))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._values.get(PREFIX + key, default))

    def array(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        values = self._values.get(PREFIX + key, default)
        if values is None:
            raise ModelFileError(f"the GGUF file has no {PREFIX}{key}, so its tokenizer cannot be built")
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)) or not all(isinstance(value, kind) for value in values):
            raise ModelFileError(f"{PREFIX}{key} must be an array of {kind.__name__}")
        return list(values)

    def token_id(self, name: str) -> int | None:
        value = self._values.get(f"{PREFIX}{name}_token_id")
        if value is None:
            return None
        if not 0 <= int(value) < len(self.tokens):
            raise ModelFileError(f"{PREFIX}{name}_token_id is {value}, outside the {len(self.tokens)} tokens")
        return int(value)

    def special_tokens(self) -> dict[str, str]:
        names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        ids = {f"{name}_token": self.token_id(key) for key, name in names.items()}
        return {name: self.tokens[token_id] for name, token_id in ids.items() if token_id is not None}


def _byte_level(metadata: _Metadata) -> tokenizers.Tokenizer:
    name = metadata.text("pre", "default")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ModelFileError(
            f"{PREFIX}pre {name!r} is not supported (known: {known}); use the model's safetensors folder"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.array("merges", str)]
    if any(len(merge) != 2 for merge in merges):
        raise ModelFileError(f"{PREFIX}merges must hold pairs of tokens separated by a space")
    model = models.BPE(vocab=metadata.vocab, merges=merges, ignore_merges=name in WHOLE_WORD_NAMES)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = PRE_TOKENIZERS[name]()
    backend.decoder = decoders.ByteLevel()
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _merges_by_score(vocab: Mapping[str, int], scores: list[float], skipped: set[int]) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours whose union scores highest: every split of every piece, best piece first."""
    merges = []
    for piece, piece_id in vocab.items():
        if piece_id in skipped:
            continue
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(vocab[left], vocab[right], left, right) for left, right in splits if left in vocab and right in vocab]
        merges += [(-scores[piece_id], piece_id, *split) for split in sorted(known)]
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for *_, left, right in merges]


def _sentencepiece(metadata: _Metadata) -> tokenizers.Tokenizer:
    scores = metadata.array("scores", float)
    if len(scores) != len(metadata.tokens):
        raise ModelFileError(f"{PREFIX}scores has {len(scores)} entries for {len(metadata.tokens)} tokens")
    whole = {UNKNOWN, CONTROL, USER_DEFINED, BYTE}
    skipped = {token_id for token_id, kind in enumerate(metadata.types) if kind in whole}
    unknown = metadata.token_id("unknown")
    model = models.BPE(
        vocab=metadata.vocab,
        merges=_merges_by_score(metadata.vocab, scores, skipped),
        unk_token=None if unknown is None else metadata.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    adds_space = metadata.flag("add_space_prefix", True)
    prepend, strip = ([normalizers.Prepend(SPACE)], [decoders.Strip(" ", 1, 0)]) if adds_space else ([], [])
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _add_special_tokens(backend: tokenizers.Tokenizer, metadata: _Metadata) -> None:
    kinds = list(zip(metadata.tokens, metadata.types, strict=True))
    control = [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == CONTROL]
    backend.add_special_tokens(control)
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == USER_DEFINED])


def _add_bos_and_eos(backend: tokenizers.Tokenizer, metadata: _Metadata, adds_bos: bool) -> None:
    wanted = {"bos": metadata.flag("add_bos_token", adds_bos), "eos": metadata.flag("add_eos_token", False)}
    ids = {name: metadata.token_id(name) for name, is_wanted in wanted.items() if is_wanted}
    found = {name: token_id for name, token_id in ids.items() if token_id is not None}
    if not found:
        return
    names = {name: metadata.tokens[token_id] for name, token_id in found.items()}
    single = [*([names["bos"]] if "bos" in names else []), "$A", *([names["eos"]] if "eos" in names else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(names[name], token_id) for name, token_id in found.items()]
    )


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer described by a GGUF file's `tokenizer.*` keys (raw names, values and arrays).

    Replies end at `eos_token_id`, `eot_token_id` or `eom_token_id`. Raises `ModelFileError` naming the key at fault,
    or a vocabulary or pre-tokenizer kind that is not supported.
    """
    kind = metadata.get(PREFIX + "model")
    if kind not in ("gpt2", "llama"):
        raise ModelFileError(f"{PREFIX}model {kind!r} is not supported: gpt2 (byte-level BPE) and llama are")
    checked = _Metadata(metadata)
    try:
        backend = _byte_level(checked) if kind == "gpt2" else _sentencepiece(checked)
        _add_special_tokens(backend, checked)
        adds_bos = kind == "llama" or checked.text("pre", "default") in WHOLE_WORD_NAMES
        _add_bos_and_eos(backend, checked, adds_bos)
    except ModelFileError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception, for example for a merge of no token
        raise ModelFileError(f"the GGUF file's tokenizer does not build: {error}") from error
    ends = [checked.token_id(name) for name in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        special_tokens=checked.special_tokens(),
        eos_token_ids=[token_id for token_id in ends if token_id is not None],
        chat_template=None if template is None else str(template),
    )
