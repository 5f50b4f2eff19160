"""Chat templates of all kinds, good and bad, rendered by transformers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from server.engine.model_tokenizer import ModelTokenizer
from server.errors import FailedPrecondition, FathomError, InvalidArgument
from server.model.source import DEMO_MODEL

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}]
STRINGS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{{ m['content'][0]['text'] }}{% endif %}{% endfor %}"
)
RENDERED = "<system>Be brief.<user>What is 2 + 3?"


def tokenizer_with(template: Any) -> ModelTokenizer:
    auto: Any = AutoTokenizer
    tokenizer = auto.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = template
    return ModelTokenizer(tokenizer, "demo")


def rendered(template: Any, chat: list[dict[str, str]] = CHAT) -> str:
    tokenizer = tokenizer_with(template)
    return tokenizer.detokenize(tokenizer.tokenize_chat(chat))


@pytest.mark.parametrize("template", [STRINGS, PARTS, EITHER])
def test_content_reaches_the_model_whichever_form_the_template_reads(template: str) -> None:
    assert rendered(template) == RENDERED


def test_changed_texts_are_not_taken_for_lost_ones() -> None:
    template = "{% for m in messages %}{{ m['content'] | upper | trim }};{% endfor %}"
    assert rendered(template) == "BE BRIEF.;WHAT IS 2 + 3?;"


def test_a_text_like_a_mark_does_not_hide_one_that_is_left_out() -> None:
    template = "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": text} for text in ("lost", "fathommark fathommark0")]
    with pytest.raises(InvalidArgument, match=r"chat\.messages\[0\]\.content: got 'lost'"):
        rendered(template, chat)


@pytest.mark.parametrize("num_messages", [1, 1024])
def test_a_chat_is_rendered_twice_at_most_however_many_texts_the_template_changes(
    num_messages: int,
) -> None:
    tokenizer = tokenizer_with("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    applied: list[int] = []
    apply = tokenizer._tokenizer.apply_chat_template

    def counted(chat: list[Any], **options: Any) -> Any:
        applied.append(len(chat))
        return apply(chat, **options)

    tokenizer._tokenizer.apply_chat_template = counted
    tokenizer.tokenize_chat([{"role": "user", "content": "abc"}] * num_messages)
    assert applied == [num_messages] * 2


@pytest.mark.parametrize(
    ("template", "field"),
    [
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
         "{% endfor %}", r"chat.messages\[0\].content"),
        ("{% for m in messages[:1] %}{{ m['content'] }}{% endfor %}",
         r"chat.messages\[1\].content"),
        ("Hello.", r"chat.messages\[0\].content"),
    ],
)  # fmt: skip
def test_a_message_that_the_template_drops_is_refused(template: str, field: str) -> None:
    with pytest.raises(InvalidArgument, match=field):
        rendered(template)


def test_what_the_template_raises_reaches_the_client() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system messages') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(InvalidArgument, match=r"chat.messages: .*no system messages"):
        rendered(template)
    assert rendered(template, CHAT[1:]) == "What is 2 + 3?"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}",  # never ends
        "{{ 1 // 0 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ undefined.attribute }}",
        {"tools": STRINGS},  # several templates, none of them the default
    ],
)
def test_a_template_that_always_fails_is_reported_as_the_models_fault(template: Any) -> None:
    with pytest.raises(FailedPrecondition, match="the chat template of model demo fails"):
        rendered(template)


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(FailedPrecondition, match="model demo has no chat template"):
        rendered(None)


@pytest.mark.parametrize(
    "content", ["", " ", "{{ 1 }}", "</s><s>", "a" * 10_000, "\N{GRINNING FACE}"]
)
def test_no_content_makes_a_sound_template_fail(content: str) -> None:
    for template in (STRINGS, PARTS, EITHER):
        tokenizer_with(template).tokenize_chat([{"role": "user", "content": content}])


def test_errors_are_those_that_clients_are_told_of() -> None:
    assert issubclass(InvalidArgument, FathomError)
    assert issubclass(FailedPrecondition, FathomError)
