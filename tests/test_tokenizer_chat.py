"""Chat templates: the text equals transformers' for templates of the families; hostile ones end in an error, soon."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from powertrain.chat_template import MAX_CHARS, ChatTemplate
from powertrain.tokenizer import Tokenizer
from powertrain.types import InvalidRequest, ModelFileError, PowertrainError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = """{%- for message in messages %}
    {%- if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA = """{{- bos_token }}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start|>' ~ message['role'] ~ loop.index ~ '<|end|>\\n\\n' ~ message['content'] | trim ~ '<|eot|>' }}
{% endfor %}
{{ 'count %s' | replace('%s', ns.count | string) }}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>' }}{% endif %}
"""
MISTRAL = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}
{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}
    {%- else %}{% generation %}{{- ' ' + message['content'] + eos_token }}{% endgeneration %}{%- endif %}
{%- endfor %}"""
MACROS = """{% macro show(value, depth) %}{% if value is mapping %}{% for key, inner in value | dictsort %}
{{ key }}={{ show(inner, depth + 1) }}{% endfor %}{% else %}{{ value | tojson(indent=2) }}{% endif %}{% endmacro %}
{% for message in messages | selectattr('role', 'equalto', 'user') | list %}{{ show(message, 0) }}{% endfor %}
{{ messages | map(attribute='role') | join(', ') | upper }} {{ messages[-1].content.split('a') | length }}
{% for i in range(3) %}{{ '-' * i }}{% if not loop.last %},{% endif %}{% endfor %}{{ strftime_now('%Y') }}"""
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "macros": MACROS}

CONVERSATIONS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text(max_size=20)},
    ),
    min_size=1,
    max_size=5,
)


def judge() -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()), **SPECIAL)


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_text_is_transformers(name: str) -> None:
    ours, theirs = ChatTemplate(TEMPLATES[name], SPECIAL), judge()

    @given(CONVERSATIONS, st.booleans())
    @settings(max_examples=150, deadline=None)
    def check(messages: list[dict[str, str]], add: bool) -> None:
        before = copy.deepcopy(messages)
        try:
            expected = theirs.apply_chat_template(
                messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=add
            )
        except Exception:
            assert name == "mistral"
            with pytest.raises(InvalidRequest, match="alternate"):
                ours.render(messages, add)
        else:
            assert ours.render(messages, add) == expected
        assert messages == before

    check()


@pytest.mark.parametrize("name", ["chatml", "llama", "mistral"])
@pytest.mark.parametrize("content", ["Sure, here", "Sure, here ", "x"])
def test_a_continued_message_is_transformers(name: str, content: str) -> None:
    messages = [{"role": "user", "content": "Hi x"}, {"role": "assistant", "content": content}]
    ours = ChatTemplate(TEMPLATES[name], SPECIAL).render(messages, False, continue_final_message=True)
    theirs = judge().apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, continue_final_message=True
    )
    assert ours == theirs
    assert ours.endswith(content.strip()) or ours.endswith(content)


def test_a_message_that_cannot_go_on_is_refused() -> None:
    messages = [{"role": "assistant", "content": "a"}]
    with pytest.raises(InvalidRequest, match="add_generation_prompt"):
        ChatTemplate(CHATML, SPECIAL).render(messages, True, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="final message"):
        ChatTemplate("fixed", SPECIAL).render(messages, False, continue_final_message=True)


def test_text_parts_are_joined_and_null_is_empty() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}", {})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}, {"role": "assistant"}]) == "[a\nb][]"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"content": "a"}], "messages[0]"),
        ([{"role": "user", "content": "a"}, {"role": 3}], "messages[1]"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "messages[0].content"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content"),
    ],
)
def test_bad_messages_are_refused_by_name(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(CHATML, SPECIAL).render(messages)
    assert caught.value.param == param


def test_a_model_without_a_template_points_to_completions() -> None:
    with pytest.raises(InvalidRequest, match="completions") as caught:
        Tokenizer(Backend(models.WordLevel({"a": 0}))).render_chat([{"role": "user", "content": "a"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages['__class__'] }}",
        "{% if x %}",
        "{% include 'x' %}{{ unclosed",
        "{{ x | no_such_filter }}",
        "(" * 10 + "{{" + "(" * 5000 + "}}",
        "{# a #}" * 200_000,
    ],
)
def test_a_template_that_cannot_be_meant_well_is_refused_when_loaded(source: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        ChatTemplate(source, SPECIAL)
    assert "\n" not in str(caught.value)


SPIN = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = [
    SPIN,
    "{% set range = 1 %}{% set rounds = 2 %}"
    + "{% for a in 'x' * 99999 %}{% for b in 'x' * 99999 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in range(10**9) %}{% endfor %}",
    "{% for a in range(99999) %}0123456789012345678901234567890123456789{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 2 ** (10 ** 9) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ 'x'.ljust(10 ** 9) }}",
    "{% set ns = namespace(s='xx') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='xx') %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | map('string') | join %}{% endfor %}",
    "{% for i in range(99999) %}{% set x = range(99999) | join %}{% endfor %}",
    "{% set x = messages | attr('__class__') %}{{ x.mro() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].nothing.deeper }}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content + 1 }}",
    "{{ cycler }}{{ lipsum(n=1000) }}",
]


@pytest.mark.parametrize("source", HOSTILE)
@pytest.mark.timeout(30)
def test_a_hostile_template_ends_in_an_error(source: str) -> None:
    with pytest.raises(PowertrainError) as caught:
        ChatTemplate(source, SPECIAL).render([{"role": "user", "content": "a"}])
    assert "\n" not in str(caught.value)


def test_a_conversation_past_the_limit_is_refused_and_the_next_is_not() -> None:
    template = ChatTemplate(CHATML, SPECIAL)
    with pytest.raises(InvalidRequest):
        template.render([{"role": "user", "content": "a" * (MAX_CHARS + 1)}])
    assert "hello" in template.render([{"role": "user", "content": "hello"}])
