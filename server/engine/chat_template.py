"""A model's chat template."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from server.errors import FailedPrecondition, FathomError, InvalidArgument

Message = Mapping[str, Any]
Form = Callable[[Message], dict[str, Any]]

# A text that tests whether the template renders messages at all. No template would trim or escape
# it, or take it for a tag.
_MARK = "fathommark"


class ChatTemplate:
    """Renders chats to prompts, whichever form of content the template reads.

    Templates read the content of a message as a string, as a list of typed parts, or as either.
    Given the other form, many render nothing and say nothing.
    """

    def __init__(self, tokenizer: Any, model_name: str) -> None:
        self._tokenizer = tokenizer
        self._model_name = model_name

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt for the reply to ``messages``, oldest first.

        Raises:
            FailedPrecondition: The template fails, whatever the messages are.
            InvalidArgument: The template refuses these messages or leaves out the text of one.
        """
        problems: list[Exception] = []
        for form in _FORMS:
            try:
                rendered = self._apply(messages, form)
                self._check_complete(messages, form, rendered)
                return rendered
            except Exception as problem:  # a template is a program, which may fail in any way
                problems.append(problem)
        raise self._refusal(messages, problems)

    def _check_complete(self, messages: Sequence[Message], form: Form, rendered: str) -> None:
        """Raise :class:`InvalidArgument` for the first message whose text is not rendered."""
        missing = [
            i for i, message in enumerate(messages) if message["content"].strip() not in rendered
        ]
        if not missing:
            return
        # The template may have changed the texts: what counts is whether it renders any. All are
        # looked for at once: a chat of a thousand messages is not rendered a thousand times.
        nonce = secrets.token_hex(8)  # so that no message has a mark already
        marks = {i: f"{_MARK}{nonce}n{i}e" for i in missing}
        marked = [
            {**message, "content": marks.get(i, message["content"])}
            for i, message in enumerate(messages)
        ]
        rendered = self._apply(marked, form).lower()
        for i, mark in marks.items():
            if mark not in rendered:
                raise InvalidArgument(
                    f"chat.messages[{i}].content",
                    messages[i]["content"],
                    "none: the model's chat template leaves out this "
                    f"{messages[i]['role']} message",
                )

    def _refusal(self, messages: Sequence[Message], problems: Sequence[Exception]) -> FathomError:
        """Return what to tell the client when no form of content could be rendered."""
        for problem in problems:
            if isinstance(problem, InvalidArgument):
                return problem
        # An error that a template raises on purpose says more than one that it runs into.
        problem = next((each for each in problems if type(each) is TemplateError), problems[0])
        if self._renders_anything:
            roles = [message["role"] for message in messages]
            allowed = f"what the model's chat template takes ({problem})"
            return InvalidArgument("chat.messages", roles, allowed)
        return FailedPrecondition(
            f"the chat template of model {self._model_name} fails "
            f"({type(problem).__name__}: {problem}); send a prompt or token ids"
        )

    @cached_property
    def _renders_anything(self) -> bool:
        """Whether the template renders a chat of one short message."""
        chat = [{"role": "user", "content": _MARK}]
        for form in _FORMS:
            with suppress(Exception):
                if _MARK in self._apply(chat, form).lower():
                    return True
        return False

    def _apply(self, messages: Sequence[Message], form: Form) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                [form(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        )


def _as_text(message: Message) -> dict[str, Any]:
    return dict(message)


def _as_parts(message: Message) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


_FORMS = (_as_text, _as_parts)
