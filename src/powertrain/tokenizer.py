"""Text to token ids and back: encoding, chat prompts, and incremental decoding that never shows half a character.

Special tokens written in plain text are parsed as special tokens, in prompts and in chat messages alike: the field's
behaviour (Hugging Face, vLLM), which prompts that were rendered elsewhere rely on.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tokenizers

from powertrain.types import FinishReason, InvalidRequest, ModelFileError, SamplingParams, TokenLogprob, TokenOutput

if TYPE_CHECKING:
    from powertrain.chat_template import ChatTemplate

SPACE = "\u2581"  # SentencePiece writes a space as this character


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in character of each byte: Latin-1's printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_level_alphabet()


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


class TokenBytes:
    """The bytes each token stands for, so that decoding is concatenation.

    Knows byte-level vocabularies (GPT-2, Llama 3, Qwen), SentencePiece ones (with or without byte fallback) and plain
    words joined by spaces. `strips_space`: the first space of a whole text was added by the encoder.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        steps = _decoder_steps(backend)
        kinds = {step["type"] for step in steps}
        unknown = kinds - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
        if unknown:
            raise ModelFileError(
                f"tokenizer decoder {min(unknown)!r} is not supported: byte-level and SentencePiece are"
            )
        self._backend = backend
        self._is_byte_level = "ByteLevel" in kinds
        self._is_words = not steps
        self._has_byte_tokens = "ByteFallback" in kinds
        self.strips_space = self._is_words or any(
            step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )
        self._cache: dict[int, bytes] = {}

    def of(self, token_id: int) -> bytes:
        """Bytes of one token; none for an id outside the vocabulary (embedding rows may be padded)."""
        piece = self._cache.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**31 else None
            piece = self._cache[token_id] = b"" if token is None else self._bytes_of_token(token)
        return piece

    def _bytes_of_token(self, token: str) -> bytes:
        if self._is_byte_level:
            values = [BYTE_OF_CHAR.get(char) for char in token]
            return bytes(v for v in values if v is not None) if None not in values else token.encode()
        if self._is_words:
            return b" " + token.encode()
        if self._has_byte_tokens and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(SPACE, " ").encode()


class Tokenizer:
    """A vocabulary with its rules, special tokens and chat template.

    `special_tokens` maps Hugging Face's names (`bos_token`, `eos_token`, `pad_token`, `unk_token`) to token strings;
    `eos_token_ids` are all ids that end a reply, which may be more than the tokenizer's own `eos_token`.
    Raises `ModelFileError` for a template that does not compile or a decoder of an unsupported kind.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._special_id("bos_token")
        eos_token_id = self._special_id("eos_token")
        own = () if eos_token_id is None else (eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *eos_token_ids)))
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.bytes = TokenBytes(backend)
        self.chat_template: ChatTemplate | None = None
        if chat_template is not None:
            from powertrain.chat_template import ChatTemplate  # Jinja is loaded only for models that chat

            self.chat_template = ChatTemplate(chat_template, self.special_tokens)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        found: int | None = None if token is None else self.backend.token_to_id(token)
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds BOS/EOS where this model's tokenizer does so.

        Special tokens written in `text` become their ids. Raises `InvalidRequest` for text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest("the text holds a lone surrogate, which is not valid Unicode", "prompt") from error
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary give nothing."""
        skipped = self.special_token_ids if skip_special_tokens else frozenset()
        text = b"".join(self.bytes.of(token_id) for token_id in ids if token_id not in skipped).decode(errors="replace")
        return text.removeprefix(" ") if self.bytes.strips_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token adds to a text; empty for an id outside the vocabulary."""
        return self.bytes.of(token_id)

    def token_text(self, token_id: int) -> str:
        """One token as text, for logprobs: U+FFFD where it holds only part of a character."""
        return self.bytes.of(token_id).decode(errors="replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text of a conversation by the model's own template.

        `continue_final_message` leaves the last message open, for the model to go on with it. Raises `InvalidRequest`
        with `param` "messages" (or the part of it at fault), also where the model has no chat template.
        """
        if self.chat_template is None:
            raise InvalidRequest("this model has no chat template: use completions with a plain prompt", "messages")
        return self.chat_template.render(messages, add_generation_prompt, continue_final_message)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of `render_chat`; the template, not the tokenizer, writes the special tokens."""
        text = self.render_chat(messages, add_generation_prompt, continue_final_message)
        try:
            return self.encode(text, add_special_tokens=False)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, "messages") from error


class _StopMatcher:
    """Follows one stop string through a stream of characters in amortised constant time (Knuth, Morris, Pratt 1977).

    `num_matched` characters at the end of the stream are the beginning of `stop`.
    """

    __slots__ = ("_fallback", "num_matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._fallback = [0] * (len(stop) + 1)
        matched = 0
        for i in range(1, len(stop)):
            while matched and stop[i] != stop[matched]:
                matched = self._fallback[matched]
            matched += stop[i] == stop[matched]
            self._fallback[i + 1] = matched

    def advance(self, char: str) -> bool:
        """Take one character; True when it completes the stop string (then the matcher is used up)."""
        while self.num_matched and char != self.stop[self.num_matched]:
            self.num_matched = self._fallback[self.num_matched]
        self.num_matched += char == self.stop[self.num_matched]
        return self.num_matched == len(self.stop)


class Detokenizer:
    """Token ids to text as they come: whole characters only, and nothing that may be part of a stop string.

    All pushes and `finish` together give `tokenizer.decode` of all ids, cut at the stop string that is complete first
    (of several at the same character, the longest), however the ids were split into pushes. `include_stop` keeps the
    stop string. `continues` says that the ids follow a prompt, so that their first space is part of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        continues: bool = False,
    ) -> None:
        self._bytes = tokenizer.bytes
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._include_stop = include_stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = tokenizer.bytes.strips_space and not continues
        self._matchers = [_StopMatcher(text) for text in stop]
        self._held = ""
        self._shown: list[str] = []
        self.stopped_by: str | None = None

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._shown)

    def push(self, ids: Iterable[int], check_stop: bool = True) -> str:
        """The text that `ids` made certain. Without `check_stop` these ids neither complete nor begin a stop string."""
        fresh = []
        for token_id in ids:
            if token_id not in self._skipped:
                fresh.append(self._release(self._utf8.decode(self._bytes.of(token_id)), check_stop))
        return "".join(fresh)

    def finish(self) -> str:
        """The rest: what was held back for a stop string that did not come, and U+FFFD for an unfinished character."""
        text = self._release(self._utf8.decode(b"", True), check_stop=True) + self._show(self._held)
        self._held = ""
        return text

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text

    def _release(self, text: str, check_stop: bool) -> str:
        if self.stopped_by is not None or not text:
            return ""
        if self._strip_space:
            text, self._strip_space = text.removeprefix(" "), False
        if not check_stop or not self._matchers:
            return self._show(text)
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            complete = [matcher.stop for matcher in self._matchers if matcher.advance(char)]
            if complete:
                self.stopped_by, self._held = max(complete, key=len), ""
                return self._show(pending[: end if self._include_stop else end - len(self.stopped_by)])
        num_safe = len(pending) - max(matcher.num_matched for matcher in self._matchers)
        self._held = pending[num_safe:]
        return self._show(pending[:num_safe])


@dataclass(slots=True, kw_only=True)
class TextDelta:
    """What one engine output adds to a sequence's text.

    `token_ids` and `logprobs` end with the token that completed a stop string. `should_abort`: the engine still runs
    a sequence that a stop string ended. `stop_reason` is the stop string or stop token id, None for EOS.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    should_abort: bool = False
    error: str | None = None


class TextStream:
    """The text side of one sequence: engine outputs in, text deltas out, stop strings honoured.

    Stop strings are looked for only in text after the first `min_tokens` tokens, as vLLM does.
    """

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._sampling = sampling
        self._detokenizer = Detokenizer(
            tokenizer, sampling.stop, sampling.include_stop_str_in_output, sampling.skip_special_tokens, continues=True
        )
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """All text so far."""
        return self._detokenizer.text

    def push(self, output: TokenOutput) -> TextDelta:
        """Take the next output of this sequence; after the finish, outputs that were under way are ignored."""
        if self.finish_reason is not None:
            return TextDelta()
        text, num_kept = self._push_tokens(output)
        self.num_tokens += num_kept
        stop_reason: int | str | None = None
        if output.finish_reason is not None and self._detokenizer.stopped_by is None:
            text += self._detokenizer.finish()
            self.finish_reason = output.finish_reason
            stop_reason = output.stop_token_id if output.stop_token_id in self._sampling.stop_token_ids else None
        if self._detokenizer.stopped_by is not None:
            self.finish_reason, stop_reason = FinishReason.STOP, self._detokenizer.stopped_by
        return TextDelta(
            text=text,
            token_ids=output.token_ids[:num_kept],
            logprobs=None if output.logprobs is None else output.logprobs[:num_kept],
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
            should_abort=self.finish_reason is not None and output.finish_reason is None,
            error=output.error,
        )

    def _push_tokens(self, output: TokenOutput) -> tuple[str, int]:
        """Text of the output's tokens and how many of them belong to it: up to the one that completed a stop string."""
        hides_stop_token = output.stop_token_id is not None and not self._sampling.include_stop_str_in_output
        num_shown = len(output.token_ids) - hides_stop_token
        text = ""
        for i, token_id in enumerate(output.token_ids[:num_shown]):
            check_stop = self.num_tokens + i >= self._sampling.min_tokens
            text += self._detokenizer.push((token_id,), check_stop)
            if self._detokenizer.stopped_by is not None:
                return text, i + 1
        return text, len(output.token_ids)
