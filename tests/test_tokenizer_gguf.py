"""GGUF vocabularies: ids equal those of transformers' own reading of the same metadata; bad metadata refused by key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from model_builders import iter_pieces
from powertrain.checkpoint.tokenizer_files import load_tokenizer
from powertrain.tokenizer import SPACE, Tokenizer
from powertrain.tokenizer_gguf import PRE_TOKENIZERS, tokenizer_from_gguf
from powertrain.types import ModelFileError

COMMON = (
    "Don't count 1234567 sheep, he said; we'll see 12 of them!\n\n  Übermut tut\tselten GUT.\r\nTheThe then there. "
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["Don't", " 1234", "The", "THE", "\n\n ", "  ", "\t", "é", "東京", "🙂", "!?/", "²½"]),
        st.text(),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """GGUF metadata of a byte-level vocabulary trained here, whose merges cross words only where the rules let them."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=7,
    )
    backend.train_from_iterator([COMMON, COMMON[7:], "1234567 12345 123 12 then there THE The\n\n"], trainer)
    vocab = backend.get_vocab()
    merges = json.loads(backend.to_str())["model"]["merges"]
    tokens = [*sorted(vocab, key=lambda token: vocab[token]), "zq", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 3), 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def judge(metadata: dict[str, Any]) -> Any:
    """The same metadata as transformers reads it."""
    keys = {"model": "tokenizer_type", "pre": "pre_tokenizer_type"}
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    return convert_gguf_tokenizer("llama", {keys.get(key, key): value for key, value in values.items()})[0]


# smollm: transformers does not know its digit rule; its proof is the ids of WikiText-2 in test_tokenizer.py.
@pytest.mark.parametrize("pre", sorted(set(PRE_TOKENIZERS) - {"smollm"}))
def test_byte_level_ids_are_transformers(byte_level: dict[str, Any], pre: str) -> None:
    metadata = {**byte_level, "tokenizer.ggml.pre": pre}
    ours, theirs = tokenizer_from_gguf(metadata), judge(metadata)
    if pre in ("llama3", "llama-v3", "llama-bpe", "tekken"):
        theirs.model.ignore_merges = True  # as in the tokenizer.json of these models; not stored in GGUF
    if pre == "qwen2":
        theirs.normalizer = transformers.Qwen2Tokenizer().backend_tokenizer.normalizer

    @given(TEXTS)
    @settings(max_examples=200, deadline=None)
    def check(text: str) -> None:
        text = text if theirs.normalizer is None else theirs.normalizer.normalize_str(text)
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special_tokens=False) == text

    check()
    assert ours.encode("e\u0301") == theirs.encode("e\u0301", add_special_tokens=False).ids


def test_pre_tokenizers_differ_where_they_should(byte_level: dict[str, Any]) -> None:
    def words(pre: str) -> list[str]:
        tokenizer = tokenizer_from_gguf({**byte_level, "tokenizer.ggml.pre": pre})
        pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str("in 12345 days")
        return [word.replace("Ġ", " ") for word, _ in pieces]

    assert words("gpt-2") == ["in", " 12345", " days"]
    assert words("llama-bpe") == ["in", " ", "123", "45", " days"]
    assert words("qwen2") == words("smollm") == ["in", " ", "1", "2", "3", "4", "5", " days"]


def test_llama3_takes_a_word_of_the_vocabulary_whole(byte_level: dict[str, Any]) -> None:
    sizes = {}
    for pre in ("llama-bpe", "tekken", "gpt-2", "qwen2"):
        tokenizer = tokenizer_from_gguf(
            {**byte_level, "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
        )
        sizes[pre] = len(tokenizer.encode("zq"))  # no merge leads to it
    assert sizes == {"llama-bpe": 1, "tekken": 1, "gpt-2": 2, "qwen2": 2}


def test_control_tokens_are_special_and_user_defined_ones_are_text(byte_level: dict[str, Any]) -> None:
    tokenizer = tokenizer_from_gguf(byte_level)
    think = tokenizer.vocab_size - 1
    assert tokenizer.encode("<think></s>") == [think, 1]
    assert tokenizer.decode([think, 1]) == "<think>"
    assert tokenizer.special_token_ids == {0, 1}


def test_bos_eos_and_end_of_turn(byte_level: dict[str, Any]) -> None:
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = tokenizer_from_gguf({**byte_level, **flags, "tokenizer.ggml.eot_token_id": 7})
    plain = tokenizer.encode("then", add_special_tokens=False)
    assert tokenizer.encode("then") == [0, *plain, 1]
    assert tokenizer.eos_token_ids == (1, 7)
    without_flag = {key: value for key, value in byte_level.items() if not key.endswith("add_bos_token")}
    assert tokenizer_from_gguf({**without_flag, "tokenizer.ggml.pre": "llama-bpe"}).encode("then")[0] == 0
    assert tokenizer_from_gguf({**without_flag, "tokenizer.ggml.pre": "gpt-2"}).encode("then") == plain


@pytest.fixture(scope="module")
def sentencepiece(shared_dir: Path) -> dict[str, Any]:
    """GGUF metadata of the stories260k vocabulary, as llama.cpp's converter writes it."""
    source = shared_dir / "models" / "stories260k" / "tok512.bin"
    if not source.is_file():
        pytest.skip("stories260k is not in the shared data folder")
    pieces = list(iter_pieces(source.read_bytes(), 512))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [piece.decode().replace(" ", "▁") for _, piece in pieces[259:]]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [score for score, _ in pieces],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@given(st.text(st.one_of(st.sampled_from("abcdeth .,'\n\u2581"), st.characters(codec="utf-8")), max_size=60))
@example(SPACE)
@settings(max_examples=300, deadline=None)
def check_sentencepiece(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids[0] == 1
    assert ours.decode(ids) == text.replace(SPACE, " ")  # SentencePiece stores a space as that character
    # transformers adds the leading space only where the text has none; SentencePiece itself always adds it.
    if text and not text.startswith((" ", SPACE)):
        assert ids[1:] == theirs.encode(text, add_special_tokens=False).ids


def test_sentencepiece_ids_are_transformers(sentencepiece: dict[str, Any]) -> None:
    ours, theirs = tokenizer_from_gguf(sentencepiece), judge(sentencepiece)
    check_sentencepiece(ours, theirs)


def test_sentencepiece_ids_are_the_folders(sentencepiece: dict[str, Any], stories260k_dir: Path) -> None:
    ours, folder = tokenizer_from_gguf(sentencepiece), load_tokenizer(stories260k_dir)
    for text in ("Once upon a time, there was a girl.", "  two spaces", "東京 🙂", "line\nline"):
        assert ours.encode(text) == folder.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_no_space_is_added_or_stripped_where_the_file_says_so(sentencepiece: dict[str, Any]) -> None:
    tokenizer = tokenizer_from_gguf({**sentencepiece, "tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    assert tokenizer.encode("the") != tokenizer.encode(" the")


def change(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update({f"tokenizer.ggml.{key}": value})


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.pop(f"tokenizer.ggml.{key}")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("pre", "made-up"), "made-up"),
        (change("model", "bert"), "bert"),
        (drop("model"), "ggml.model"),
        (drop("tokens"), "no tokenizer.ggml.tokens"),
        (drop("merges"), "no tokenizer.ggml.merges"),
        (change("tokens", []), "empty"),
        (change("tokens", [1, 2]), "array of str"),
        (change("tokens", ["a", "a"]), "token_type has"),
        (change("token_type", None), "twice"),
        (change("merges", ["ab"]), "pairs"),
        (change("merges", ["zzzz qqqq"]), "does not build"),
        (change("merges", "a b"), "array of str"),
        (change("eos_token_id", 10**6), "eos_token_id"),
        (change("bos_token_id", -1), "bos_token_id"),
        (lambda metadata: metadata.update({"tokenizer.chat_template": "{% for %}"}), "line 1"),
    ],
)
def test_bad_metadata_is_refused_by_key(
    byte_level: dict[str, Any], edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    metadata = dict(byte_level)
    edit(metadata)
    if message == "twice":
        metadata.pop("tokenizer.ggml.token_type")
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<s>"]
    with pytest.raises(ModelFileError, match=message):
        tokenizer_from_gguf(metadata)


def test_scores_that_do_not_fit_the_tokens_are_refused(sentencepiece: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match="scores"):
        tokenizer_from_gguf({**sentencepiece, "tokenizer.ggml.scores": [0.0]})
