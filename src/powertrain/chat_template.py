"""Chat templates: a model's own Jinja template turns a conversation into prompt text, in a sandbox with limits.

A template comes with the weights, so it is somebody else's program: it reads no private attribute, loops, recurses and
writes only so much, and what it gets wrong is an error, never a hang.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from powertrain.types import InvalidRequest, ModelFileError

MAX_CHARS = 2_000_000  # of the prompt, and of any string a template makes on the way
MAX_ROUNDS = 1_000_000  # loop rounds, calls and filters in one rendering
MAX_SECONDS = 2.0  # of this thread's processor time in one rendering
MAX_TEMPLATE_CHARS = 1_000_000
UNUSED_FILTERS = ("batch", "center", "format", "slice", "urlize", "wordwrap", "xmlattr")  # take a size or make HTML
UNUSED_GLOBALS = ("lipsum", "cycler", "joiner")
SIZE_SETTERS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})
# Written after a message that is to be continued, then cut off with all that follows it. Ends in a space to tell
# whether the template trims its messages.
CONTINUE_HERE = "\ue0c0continue here\ue0c1 "


class _LimitError(Exception):
    """A template went past one of the limits above."""


class _Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.num_left = MAX_ROUNDS
        self.deadline = time.thread_time() + MAX_SECONDS

    def spend(self) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            raise _LimitError(f"more than {MAX_ROUNDS} rounds of loops and calls")
        if time.thread_time() > self.deadline:
            raise _LimitError(f"more than {MAX_SECONDS} s")


# Not a template variable, because a template could then set it.
_budget: ContextVar[_Budget] = ContextVar("budget")


def _rounds(items: Iterable[Any]) -> Iterator[Any]:
    """`items`, each for one round of the budget."""
    budget = _budget.get()
    for item in items:
        budget.spend()
        yield item


def _checked(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)) and len(value) > MAX_CHARS:
        raise _LimitError(f"a value of more than {MAX_CHARS} characters or items")
    return value


def _raise_exception(message: str) -> None:
    raise InvalidRequest(f"the chat template refused the messages: {message}", "messages")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes <, > and & for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the marks by which Jinja knows what to pass
    def call(*args: Any, **kwargs: Any) -> Any:
        if (budget := _budget.get(None)) is not None:  # Jinja folds constants before any rendering
            budget.spend()
        return _checked(function(*args, **kwargs))

    return call


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; its content is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's way to declare tags

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Limits(NodeTransformer):
    """Makes loops spend the budget, and `~` a `+`, which the sandbox can watch."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - the name Jinja calls
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "rounds", [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802 - the name Jinja calls
        self.generic_visit(node)
        texts: list[nodes.Expr] = [nodes.Filter(part, "string", [], [], None, None) for part in node.nodes]
        return functools.reduce(lambda left, right: nodes.Add(left, right), texts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with limits on work and sizes."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        kept = {name: _bounded(function) for name, function in self.filters.items() if name not in UNUSED_FILTERS}
        self.filters = {**kept, "tojson": _bounded(_to_json), "rounds": _rounds}
        for name in UNUSED_GLOBALS:
            del self.globals[name]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        read = [node.attr for node in tree.find_all(nodes.Getattr)]
        read += [node.arg.value for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)]
        for attribute in read:
            if isinstance(attribute, str) and attribute.startswith("__"):
                raise ModelFileError(f"the chat template reads {attribute!r}, which no honest template needs")
        _Limits().visit(tree)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        is_size_setter = isinstance(obj, str) and attr in SIZE_SETTERS
        return not is_size_setter and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leaves `str.format` to `is_safe_attribute`; Jinja's own wrapper allows any width."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise _LimitError("formatting by % is not available")
        if operator == "**" and not (abs(left) <= MAX_ROUNDS and abs(right) <= 16):
            raise _LimitError("a power of large numbers")
        if operator == "*":
            sizes = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
            if sizes[0] * sizes[1] > MAX_CHARS:
                raise _LimitError(f"a product of more than {MAX_CHARS}")
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.get().spend()
        return _checked(super().call(context, function, *args, **kwargs))


@functools.cache
def _sandbox() -> _Sandbox:
    return _Sandbox()


def _plain_content(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message with its content as one string: text parts are joined by newlines, as vLLM does."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where} must be an object with a role", where)
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            text = part.get("text") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(text, str):
                raise InvalidRequest(f"{where}.content has a part that is not text, got {kind!r}", f"{where}.content")
            texts.append(text)
        content = "\n".join(texts)
    if content is not None and not isinstance(content, str):
        raise InvalidRequest(f"{where}.content must be a string or a list of text parts", f"{where}.content")
    return {**message, "content": "" if content is None else content}


class ChatTemplate:
    """One compiled template. `special_tokens` (`bos_token`, `eos_token`, ...) are variables in it.

    Raises `ModelFileError` if the source does not parse or reads Python's inner attributes.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelFileError(f"the chat template has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}")
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _sandbox().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelFileError(f"the chat template does not parse: line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise ModelFileError(f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text of `messages`. Raises `InvalidRequest` for messages the template cannot take or refuses.

        A template that tries to leave its sandbox is a `ModelFileError`.
        """
        if isinstance(messages, (str, Mapping)) or not messages:
            raise InvalidRequest("messages must be a list of at least one message", "messages")
        plain = [_plain_content(message, index) for index, message in enumerate(messages)]
        if not continue_final_message:
            return self._render(plain, add_generation_prompt)
        if add_generation_prompt:
            raise InvalidRequest("continue_final_message excludes add_generation_prompt", "continue_final_message")
        plain[-1]["content"] += CONTINUE_HERE
        text = self._render(plain, add_generation_prompt=False)
        cut = text.rfind(CONTINUE_HERE.rstrip())
        if cut < 0:
            raise InvalidRequest(
                "the chat template leaves out the final message, so it cannot be continued", "messages"
            )
        is_trimmed = not text.startswith(CONTINUE_HERE, cut)
        return text[:cut].rstrip() if is_trimmed else text[:cut]

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        variables = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        parts: list[str] = []
        num_chars = 0
        token = _budget.set(_Budget())
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_CHARS:
                    raise _LimitError(f"a prompt of more than {MAX_CHARS} characters")
        except InvalidRequest:
            raise
        except jinja2.exceptions.SecurityError as error:
            raise ModelFileError(f"the chat template tried to leave its sandbox: {error}") from error
        except Exception as error:  # a template is a program: whatever it raises is about these messages
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InvalidRequest(f"the chat template failed on these messages: {reason}", "messages") from error
        finally:
            _budget.reset(token)
        return "".join(parts)
