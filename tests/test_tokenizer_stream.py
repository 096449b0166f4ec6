"""Detokenizer and TextStream: however tokens are split, the same text, and never a stop string."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from powertrain.tokenizer import Detokenizer, TextDelta, TextStream, Tokenizer
from powertrain.types import FinishReason, SamplingParams, TokenLogprob, TokenOutput

WORDS = ["the", " the", "ab", "abc", "bc", "</", "stop", " st", "op", "é", "東", "\n\n", "  ", "aa"]


def byte_level_backend() -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [encode.pre_tokenize_str(word)[0][0] for word in WORDS]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*alphabet, *pieces]))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = encode
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<think>"])
    return backend


def sentencepiece_backend() -> Backend:
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "c",
        "s",
        "t",
        "▁the",
        "▁st",
        "op",
        "🙂",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    backend = byte_level_backend() if kind == "byte_level" else sentencepiece_backend()
    return Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


KINDS = st.sampled_from(["byte_level", "sentencepiece"])
STOPS = st.lists(st.text(alphabet="abcst op\n<é東�", min_size=1, max_size=6), max_size=4)


@st.composite
def pushes(draw: st.DrawFn) -> tuple[Tokenizer, list[list[int]]]:
    """A tokenizer, and ids in random order or spelling a random text, cut into pushes."""
    tokenizer = tokenizer_of(draw(KINDS))
    size = tokenizer.vocab_size
    random_ids = st.lists(st.integers(0, size + 3), max_size=40)
    spelled = st.text(alphabet="abcstop th<é東🙂\n", max_size=40).map(lambda text: tokenizer.encode(text))
    ids = draw(st.one_of(random_ids, spelled))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    bounds = [0, *cuts, len(ids)]
    return tokenizer, [ids[start:end] for start, end in itertools.pairwise(bounds)]


@given(pushes(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_all_pushes_together_are_decode(case: tuple[Tokenizer, list[list[int]]], skip: bool) -> None:
    tokenizer, parts = case
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    deltas = [detokenizer.push(part) for part in parts] + [detokenizer.finish()]
    ids = [token_id for part in parts for token_id in part]
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip) == detokenizer.text


@given(st.lists(st.integers(0, 400), max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_byte_level_decode_is_the_librarys(ids: list[int], skip: bool) -> None:
    tokenizer = tokenizer_of("byte_level")
    assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=60))
@example("\u2581")
@example("\u2581 a\u2581")
@settings(max_examples=300, deadline=None)
def test_sentencepiece_decode_is_the_librarys_on_text(text: str) -> None:
    tokenizer = tokenizer_of("sentencepiece")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids)


def first_stop(text: str, stop: list[str]) -> tuple[int, str] | None:
    """By brute force: the end of the stop string complete first, and the longest one there."""
    for end in range(len(text) + 1):
        if found := [one for one in stop if text[:end].endswith(one)]:
            return end, max(found, key=len)
    return None


@given(pushes(), STOPS, st.booleans())
@settings(max_examples=600, deadline=None)
def test_stop_strings_cut_at_the_earliest_and_never_show(
    case: tuple[Tokenizer, list[list[int]]], stop: list[str], include: bool
) -> None:
    tokenizer, parts = case
    detokenizer = Detokenizer(tokenizer, stop, include)
    shown = ""
    for part in parts:
        shown += detokenizer.push(part)
        assert include or not any(one in shown for one in stop)
    shown += detokenizer.finish()
    whole = tokenizer.decode([token_id for part in parts for token_id in part])
    found = first_stop(whole, stop)
    if found is None:
        assert (shown, detokenizer.stopped_by) == (whole, None)
    else:
        end, one = found
        assert (shown, detokenizer.stopped_by) == (whole[: end if include else end - len(one)], one)


@given(st.text(alphabet="é東🙂a", max_size=12))
@settings(max_examples=100, deadline=None)
def test_no_half_character_is_ever_shown(text: str) -> None:
    for kind in ("byte_level", "sentencepiece"):
        tokenizer = tokenizer_of(kind)
        detokenizer = Detokenizer(tokenizer)
        assert all("�" not in detokenizer.push([token_id]) for token_id in tokenizer.encode(text))
        assert detokenizer.finish() == ""
        assert detokenizer.text == text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=2, max_size=6), min_size=1, max_size=3))
@example("aabaaabaaab", ["aabaaabaaab"])
@example("aabaaabaaaba", ["aabaaaba"])
@example("aabaaabaaacb", ["aabaaac"])
@settings(max_examples=400, deadline=None)
def test_stop_strings_that_overlap_themselves_are_found(text: str, stop: list[str]) -> None:
    tokenizer = tokenizer_of("byte_level")
    detokenizer = Detokenizer(tokenizer, stop)
    shown = "".join(detokenizer.push([token_id]) for token_id in tokenizer.encode(text)) + detokenizer.finish()
    end, one = first_stop(text, stop) or (len(text), "")
    assert (shown, detokenizer.stopped_by) == (text[: end - len(one)], one or None)


def test_text_is_shown_as_soon_as_no_stop_string_can_hold_it() -> None:
    tokenizer = tokenizer_of("byte_level")
    detokenizer = Detokenizer(tokenizer, ["stop now"])
    assert detokenizer.push(tokenizer.encode("go st")) == "go "
    assert detokenizer.push(tokenizer.encode("eady sto")) == "steady "
    assert detokenizer.push(tokenizer.encode("p n")) == ""
    assert detokenizer.finish() == "stop n"


def test_the_first_space_of_a_continuation_is_part_of_the_text() -> None:
    tokenizer = tokenizer_of("sentencepiece")
    ids = tokenizer.backend.encode("the", add_special_tokens=False).ids
    assert Detokenizer(tokenizer).push(ids) + Detokenizer(tokenizer).finish() == "the"
    assert Detokenizer(tokenizer, continues=True).push(ids) == " the"


def output(ids: list[int], finish: FinishReason | None = None, stop_token_id: int | None = None) -> TokenOutput:
    logprobs = [TokenLogprob(token_id, -1.0, 1) for token_id in ids]
    return TokenOutput(
        request_id="r", index=0, token_ids=ids, logprobs=logprobs, finish_reason=finish, stop_token_id=stop_token_id
    )


def test_stream_ends_at_a_stop_string_inside_an_output_of_several_tokens() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("abcstopabc")
    first, last = ids[:2], ids[2:]
    stream = TextStream(tokenizer, SamplingParams(stop=("stop",)))
    delta = stream.push(output(first))
    assert (delta.text, delta.finish_reason, delta.should_abort) == (tokenizer.decode(first), None, False)
    delta = stream.push(output(last))
    assert (delta.finish_reason, delta.stop_reason, delta.should_abort) == (FinishReason.STOP, "stop", True)
    assert stream.text == "abc"
    assert tokenizer.decode(first + delta.token_ids) == "abcstop"
    assert delta.logprobs is not None
    assert [one.token_id for one in delta.logprobs] == delta.token_ids
    assert stream.num_tokens == len(first) + len(delta.token_ids)
    assert stream.push(output(ids)) == TextDelta()


@pytest.mark.parametrize(
    ("include", "skip", "text"), [(False, False, "ab"), (True, False, "ab</s>"), (True, True, "ab")]
)
def test_the_stop_token_is_in_the_ids_and_not_in_the_text(include: bool, skip: bool, text: str) -> None:
    tokenizer = tokenizer_of("byte_level")
    eos = tokenizer.eos_token_ids[0]
    sampling = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=skip)
    ids = [*tokenizer.encode("ab"), eos]
    delta = TextStream(tokenizer, sampling).push(output(ids, FinishReason.STOP, eos))
    assert (delta.text, delta.token_ids, delta.stop_reason, delta.should_abort) == (text, ids, None, False)


def test_a_stop_token_id_is_the_reason_and_held_text_comes_out_at_the_end() -> None:
    tokenizer = tokenizer_of("byte_level")
    newline = tokenizer.encode("\n")[0]
    stream = TextStream(tokenizer, SamplingParams(stop=("stop",), stop_token_ids=(newline,)))
    assert stream.push(output(tokenizer.encode("a sto"))).text == "a "
    delta = stream.push(output([newline], FinishReason.STOP, newline))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("sto", FinishReason.STOP, newline)


def test_a_stop_string_completed_by_the_last_token_wins_over_length() -> None:
    tokenizer = tokenizer_of("byte_level")
    delta = TextStream(tokenizer, SamplingParams(stop=("b",))).push(output(tokenizer.encode("ab"), FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, delta.should_abort) == ("a", FinishReason.STOP, False)


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = [tokenizer.encode(char)[0] for char in "aaab"]
    stream = TextStream(tokenizer, SamplingParams(stop=("a",), min_tokens=2))
    delta = stream.push(output(ids))
    assert (delta.text, delta.token_ids) == ("aa", ids[:3])


def test_an_error_passes_through() -> None:
    tokenizer = tokenizer_of("byte_level")
    failed = TokenOutput(request_id="r", index=0, token_ids=[], finish_reason=FinishReason.ERROR, error="boom")
    delta = TextStream(tokenizer, SamplingParams()).push(failed)
    assert (delta.finish_reason, delta.error) == (FinishReason.ERROR, "boom")
