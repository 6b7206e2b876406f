from __future__ import annotations

import datetime
from typing import Any

import pytest
from tandem_runtime.frontend.chat import ChatTemplate, ChatTemplateError
from tandem_runtime.frontend.tokenizer import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi <b>&</b>"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "  and 2+2?\n"},
    ],
]
TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n[INST] {{ m.content | trim }} [/INST]\n"
    "  {% else %}\n{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n"
    "  {% endif %}\n{% endfor %}{% if add_generation_prompt %}ANSWER{% endif %}",
    "{{ bos_token }}{{ messages | tojson }}{% for m in messages %}{% if loop.index > 1 %}"
    "{% break %}{% endif %}{{ m['content'] }}{% endfor %}",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_smollm2_equals_transformers(
    messages: list[dict[str, Any]], add_generation_prompt: bool, smollm2: Tokenizer
) -> None:
    source = smollm2.bundle.chat_template
    assert source is not None
    special = smollm2.bundle.special_tokens
    expected, _ = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **special,
    )
    ours = ChatTemplate(source, special)
    assert ours.render(messages, add_generation_prompt=add_generation_prompt) == expected[0]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("source", TEMPLATES)
def test_other_templates_equal_transformers(source: str, messages: list[dict[str, Any]]) -> None:
    expected, _ = render_jinja_template(
        conversations=[messages], chat_template=source, add_generation_prompt=True, **SPECIAL
    )
    assert ChatTemplate(source, SPECIAL).render(messages) == expected[0]


def test_the_clock_is_an_argument() -> None:
    now = datetime.datetime(2024, 7, 26)
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: now)
    assert template.render([]) == "26 Jul 2024"


def test_a_template_refuses_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.render(CONVERSATIONS[0])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.join(messages) }}",
    ],
)
def test_what_a_template_trips_over_is_one_kind_of_error(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render(CONVERSATIONS[0])


def test_a_broken_template_is_told() -> None:
    with pytest.raises(ChatTemplateError, match="broken"):
        ChatTemplate("{% if %}", {})
