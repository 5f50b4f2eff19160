"""Bodies of requests: JSON objects of known fields, within limits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from server.calls.generation import ChatPrompt, TextPrompt, TokenPrompt
from server.errors import InvalidArgument
from server.openai import depth_names

# Each choice is a request of its own, for which room must be found.
MAX_CHOICES = 256

_SAMPLING = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "min_p",
        "min_tokens",
        "model",
        "n",
        "presence_penalty",
        "repetition_penalty",
        "request_id",
        "response_format",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "seed",
        "skip_special_tokens",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_options",
        "structured_outputs",
        "temperature",
        "top_k",
        "top_p",
    }
)
COMPLETION = _SAMPLING | {"add_special_tokens", "echo", "prompt", "prompt_logprobs"}
CHAT = _SAMPLING | {
    "add_generation_prompt",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "max_completion_tokens",
    "messages",
    "parallel_tool_calls",
    "reasoning_effort",
    "tool_choice",
    "tools",
    "top_logprobs",
}
# Fields of OpenAI's API that change nothing about an answer here.
_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Entries that a field may have; every stop string is looked for after each token.
_MAX_ENTRIES = {
    "allowed_token_ids": 2**18,
    "bad_words": 128,
    "documents": 1024,
    "logit_bias": 1024,
    "messages": 1024,
    "stop": 16,
    "stop_token_ids": 128,
    "tools": 128,
}
_MAX_WORD_CHARACTERS = {"bad_words": 256, "stop": 256}
_MAX_ROLE_CHARACTERS = 64
_MAX_PARTS = 1024
_MAX_TOOL_CALLS = 128
# What a message may have beside role and content.
_MESSAGE_FIELDS = frozenset(
    {"name", "reasoning", "reasoning_content", "tool_call_id", "tool_calls"}
)


def parsed(data: bytes) -> dict[str, Any]:
    """Return the JSON object in ``data``; raise :class:`InvalidArgument` if there is none."""
    try:
        fields = json.loads(data, parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in data:  # half a surrogate pair may be written so, which is no text
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else str(error)
        raise InvalidArgument("body", reason[:200], "a JSON object, in UTF-8") from None
    if not isinstance(fields, dict):
        raise InvalidArgument("body", type(fields).__name__, "a JSON object")
    return fields


def check_fields(
    body: Mapping[str, Any], offered: frozenset[str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields that have an effect, without those about the depth.

    ``defaults`` has the fields of vLLM: one that is not offered may have the value that changes
    nothing. Raises :class:`InvalidArgument` for any other field, and for too many entries.
    """
    known: dict[str, Any] = {}
    for name, value in body.items():
        if name in offered:
            if value is not None or name == "max_tokens":
                _check_size(name, value)
                known[name] = value
        elif name not in depth_names.FIELDS | _WITHOUT_EFFECT and not (
            value is None or (name in defaults and value == defaults[name])
        ):
            is_vllms = name in defaults
            allowed = "none: this server does not offer it" if is_vllms else "no such field"
            raise InvalidArgument(name[:80], value, allowed)
    return known


def prompts_of(value: object, *, special_tokens: bool = True) -> list[TextPrompt | TokenPrompt]:
    """Return the prompts of a completion: one or several, as text or token ids."""
    match value:
        case str():
            return [TextPrompt(value, special_tokens)]
        case [int(), *_]:
            return [_token_prompt(value, "prompt")]
        case [_, *_] if len(value) <= MAX_CHOICES:
            return [
                TextPrompt(each, special_tokens)
                if isinstance(each, str)
                else _token_prompt(each, f"prompt[{i}]")
                for i, each in enumerate(value)
            ]
        case [_, *_]:
            allowed = f"at most {MAX_CHOICES} prompts"
            raise InvalidArgument("prompt", f"{len(value)} prompts", allowed)
        case _:
            allowed = "a text, token ids, or a list of these that is not empty"
            raise InvalidArgument("prompt", value, allowed)


def _token_prompt(ids: object, field: str) -> TokenPrompt:
    if not isinstance(ids, list):
        raise InvalidArgument(field, ids, "a text, or token ids")
    return TokenPrompt(token_ids(ids, field))


def token_ids(ids: list[Any], field: str) -> tuple[int, ...]:
    """Return ids; raise :class:`InvalidArgument`, naming the entry, for what is no whole number."""
    for i, token_id in enumerate(ids):
        if type(token_id) is not int:
            raise InvalidArgument(f"{field}[{i}]", token_id, "a token id")
    return tuple(ids)


def plain_chat(messages: object) -> ChatPrompt | None:
    """Return a chat of texts alone; None if there is more to a message, such as calls of tools."""
    if not isinstance(messages, list) or not messages:
        raise InvalidArgument("messages", messages, "a list of at least one message")
    plain: list[dict[str, str]] = []
    is_plain = True
    for i, message in enumerate(messages):
        field = f"messages[{i}]"
        if not isinstance(message, dict):
            raise InvalidArgument(field, message, "an object with role and content")
        role = message.get("role")
        if not isinstance(role, str) or not 1 <= len(role) <= _MAX_ROLE_CHARACTERS:
            allowed = f"a role, such as user, of at most {_MAX_ROLE_CHARACTERS} characters"
            raise InvalidArgument(f"{field}.role", role, allowed)
        more = {name for name, value in message.items() if value not in (None, [])}
        more -= {"role", "content"}
        if unknown := sorted(more - _MESSAGE_FIELDS):
            allowed = f"role, content, {', '.join(sorted(_MESSAGE_FIELDS))}"
            raise InvalidArgument(f"{field}.{unknown[0][:80]}", message[unknown[0]], allowed)
        calls = message.get("tool_calls") or ()
        if not isinstance(calls, list | tuple) or len(calls) > _MAX_TOOL_CALLS:
            raise InvalidArgument(f"{field}.tool_calls", calls, f"at most {_MAX_TOOL_CALLS}")
        is_plain = is_plain and not more
        if message.get("content") is None and calls:
            continue
        text = _text_of(message.get("content"), f"{field}.content")
        plain.append({"role": role, "content": text})
    return ChatPrompt(tuple(plain)) if is_plain else None


def num_characters(value: object) -> int:
    """Return the number of characters of all texts in a value of JSON."""
    total, waiting = 0, [value]
    while waiting:
        match waiting.pop():
            case str() as text:
                total += len(text)
            case dict() as fields:
                waiting += [*fields, *fields.values()]
            case list() as values:
                waiting += values
    return total


def _text_of(content: object, field: str) -> str:
    """Return the text of a message: a text, or parts of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not 1 <= len(content) <= _MAX_PARTS:
        raise InvalidArgument(field, content, f"a text, or 1 to {_MAX_PARTS} parts of text")
    texts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            allowed = "a part of type text: this server takes no images, sounds or files"
            raise InvalidArgument(f"{field}[{i}]", part, allowed)
        texts.append(text)
    return "\n".join(texts)


def _check_size(name: str, value: object) -> None:
    most = _MAX_ENTRIES.get(name)
    if most is None:
        return
    if isinstance(value, list | dict) and len(value) > most:
        raise InvalidArgument(name, f"{len(value)} entries", f"at most {most}")
    if name == "allowed_token_ids" and isinstance(value, list):
        token_ids(value, name)
    longest = _MAX_WORD_CHARACTERS.get(name)
    if longest is None:
        return
    words = value if isinstance(value, list) else [value]
    for word in words:
        if isinstance(word, str) and not 1 <= len(word) <= longest:
            raise InvalidArgument(name, word, f"1 to {longest} characters")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large")
    return number
