"""Token ids and chat prompts judged by transformers and by llama.cpp's published ids; broken files refused by name."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from powertrain.checkpoint.tokenizer_files import hugging_face_files, load_tokenizer
from powertrain.tokenizer import SPACE, Tokenizer
from powertrain.types import InvalidRequest, ModelFileError

TEXTS = st.text(
    alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("ab c d,.!?'s\n\té東🙂123\u2581")), max_size=80
)
WIKITEXT2_IDS_SHA256 = "18e663b61dd00f49796c8a6ae498b7dbe009cac4a2eaf3c67fa7d81baf47d945"


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Callable[[str], Path]) -> tuple[Tokenizer, Any]:
    """Ours and transformers' tokenizer of a byte-level folder."""
    path = tiny_model_dir("llama")
    return load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def stories(stories260k_dir: Path) -> tuple[Tokenizer, Any]:
    """The same of a SentencePiece folder that adds BOS."""
    return load_tokenizer(stories260k_dir), transformers.AutoTokenizer.from_pretrained(stories260k_dir)


@pytest.fixture(params=["tiny", "stories"])
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, Any]:
    chosen: tuple[Tokenizer, Any] = request.getfixturevalue(request.param)
    return chosen


def test_folder_ids_and_text_are_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    # SentencePiece stores a space as this character, so that one written in the text comes back as a space.
    written_space = " " if ours.bytes.strips_space else SPACE

    @given(TEXTS, st.booleans())
    @example(SPACE, False)
    @example(f"a{SPACE} {SPACE}b", True)
    @settings(max_examples=300, deadline=None)
    def check(text: str, add: bool) -> None:
        ids = ours.encode(text, add_special_tokens=add)
        assert ids == theirs(text, add_special_tokens=add)["input_ids"]
        assert ours.decode(ids) == text.replace(SPACE, written_space)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, clean_up_tokenization_spaces=False)

    check()


def test_special_tokens_are_the_folders(tiny: tuple[Tokenizer, Any], stories: tuple[Tokenizer, Any]) -> None:
    for ours, theirs in (tiny, stories):
        assert ours.bos_token_id == theirs.bos_token_id
        assert ours.eos_token_ids == (theirs.eos_token_id,)
        assert ours.vocab_size == len(theirs)
    assert stories[0].encode("a")[0] == stories[0].bos_token_id


def test_special_tokens_in_plain_text_are_parsed(tiny: tuple[Tokenizer, Any]) -> None:
    ours, theirs = tiny
    assert ours.encode("a</s>b") == theirs("a</s>b")["input_ids"]
    assert ours.eos_token_ids[0] in ours.encode("a</s>b")


def test_ids_outside_the_vocabulary_give_no_text(tiny: tuple[Tokenizer, Any]) -> None:
    ours, _ = tiny
    assert ours.decode([ours.vocab_size + 7, -1, 2**40]) == ""
    assert ours.token_bytes(ours.vocab_size + 7) == b""


def test_a_lone_surrogate_is_an_invalid_request(tiny: tuple[Tokenizer, Any]) -> None:
    ours, _ = tiny
    with pytest.raises(InvalidRequest, match="surrogate"):
        ours.encode("a\ud800")
    with pytest.raises(InvalidRequest, match="surrogate") as caught:
        ours.apply_chat_template([{"role": "user", "content": "a\ud800"}])
    assert caught.value.param == "messages"


def test_wikitext2_ids_of_the_default_model(shared_dir: Path, smollm2_gguf: Path) -> None:
    text = gzip.decompress((shared_dir / "data/wikitext2/wiki.test.raw.gz").read_bytes()).decode()
    tokenizer = load_tokenizer(smollm2_gguf)
    ids = tokenizer.encode(text)
    assert len(ids) == 303_415
    assert hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest() == WIKITEXT2_IDS_SHA256
    assert tokenizer.decode(ids) == text


def test_default_model_written_as_a_folder_is_read_alike_by_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(smollm2_gguf)
    for name, content in hugging_face_files(smollm2_gguf).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)

    @given(TEXTS)
    @settings(max_examples=100, deadline=None)
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"] == again.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)  # the vocabulary lacks some bytes: not always the text

    check()
    messages = [{"role": "user", "content": "Hello <|im_end|> 42"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.apply_chat_template(messages) == again.apply_chat_template(messages) == expected
    assert again.eos_token_ids == ours.eos_token_ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer_config.json", "[1", "not valid JSON"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("chat_template.jinja", "{% if %}", "line 1"),
    ],
)
def test_a_broken_folder_is_refused_by_name(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tiny_model_dir("llama") / file).read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_template_file_special_token_objects_and_several_eos(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tiny_model_dir("llama") / "tokenizer.json").read_bytes())
    config = {"eos_token": {"content": "</s>", "special": True}, "chat_template": "ignored"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == (1, 4)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi</s>"


def test_truncation_and_padding_stored_in_a_tokenizer_file_are_off(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    backend = Backend.from_file(str(tiny_model_dir("llama") / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("a b c d e")) > 2
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("a")) == "a"


def test_a_decoder_of_another_kind_is_refused() -> None:
    backend = Backend(models.WordLevel({"a": 0}))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelFileError, match="WordPiece"):
        Tokenizer(backend)


def test_words_without_a_decoder_are_joined_by_spaces() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert Tokenizer(backend).decode([0, 1, 1]) == backend.decode([0, 1, 1]) == "a b b"
