"""From a client's prompt to token ids that fit the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from server.calls.generation import ChatPrompt, Prompt, Scoring, TextPrompt, TokenPrompt
from server.engine.base import Engine
from server.errors import InvalidArgument

T = TypeVar("T")

# In characters; longer texts take long enough to tokenize that others would notice.
_LONG_TEXT = 65536


class PromptReader:
    """Tokenizes off the event loop, and refuses what cannot fit before it costs anything.

    The engine must have been started.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # Long texts are kept out of the way of short ones.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._threads_for_long = ThreadPoolExecutor(1, thread_name_prefix="long-tokenizer")

    def close(self) -> None:
        for threads in (self._threads, self._threads_for_long):
            threads.shutdown(wait=False, cancel_futures=True)

    async def read_to_generate(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt that something is to follow; see :meth:`read`."""
        match prompt:
            case TextPrompt(""):
                raise InvalidArgument("prompt", "", "at least one token")
            case ChatPrompt(()):
                raise InvalidArgument("chat.messages", [], "at least one message")
        fields = "prompt", "token_ids.ids"
        ids = await self.read(prompt, *fields)
        if not ids:
            raise InvalidArgument(field_of(prompt, *fields), ids, "at least one token")
        return ids

    async def read_to_score(self, request: Scoring) -> tuple[list[int], list[int]]:
        """Return the ids of the context, which may be none, and of what is scored after it.

        Texts are tokenized as the one text that they make: where a token spans the end of the
        context, it is scored, too. Raises :class:`InvalidArgument`, as :meth:`read` does, and
        where there is nothing to score.
        """
        context, continuation = request.context, request.continuation
        fields = "text", "token_ids.ids"
        field = field_of(continuation, *fields)
        if context is None:
            context_ids, ids = [], await self.read(continuation, *fields)
        else:
            context_fields = "context_text", "context_ids.ids"
            context_ids = await self.read(context, *context_fields)
            if not context_ids:
                raise InvalidArgument(field_of(context, *context_fields), "", "at least one token")
            if isinstance(context, TextPrompt) and isinstance(continuation, TextPrompt):
                whole = await self.read(TextPrompt(context.text + continuation.text), *fields)
                num_shared = _num_shared(context_ids, whole)
                if num_shared == 0:
                    allowed = "at least one token that does not join with those of text"
                    raise InvalidArgument("context_text", context.text, allowed)
                context_ids, ids = whole[:num_shared], whole[num_shared:]
            else:
                ids = await self.read(continuation, *fields, special_tokens=False)
        if len(context_ids) + len(ids) < 2 or not ids:
            allowed = "at least one token to score, after at least one token of context"
            raise InvalidArgument(field, f"{len(ids)} tokens", allowed)
        self.check_length(len(context_ids) + len(ids), field)
        return context_ids, ids

    async def read(
        self, prompt: Prompt, text_field: str, ids_field: str, *, special_tokens: bool = True
    ) -> list[int]:
        """Return the ids of a prompt, which may be none.

        Raises :class:`InvalidArgument`, naming the field that the prompt came in, for one that
        is longer than the context and for ids that are not in the vocabulary.
        """
        field = field_of(prompt, text_field, ids_field)
        self._check_characters(prompt, field)
        ids = await self.tokenize(prompt, special_tokens=special_tokens)
        self.check_length(len(ids), field)
        check_ids(ids, field, self._engine.model.vocab_size)
        return ids

    async def tokenize(self, prompt: Prompt, *, special_tokens: bool = True) -> list[int]:
        """Return the ids of a prompt of any length."""
        match prompt:
            case TextPrompt(text):
                return await self._in_thread(
                    lambda: self._engine.tokenize(text, special_tokens=special_tokens), len(text)
                )
            case TokenPrompt(ids):
                return list(ids)
            case ChatPrompt(messages):
                return await self._in_thread(
                    lambda: self._engine.tokenize_chat(messages), _num_characters(prompt)
                )

    async def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token by itself."""
        return await self._in_thread(lambda: self._engine.token_texts(ids), len(ids))

    def text(self, prompt: Prompt, ids: Sequence[int]) -> str:
        """Return the text of a prompt that has been read as ``ids``."""
        return (
            prompt.text if isinstance(prompt, TextPrompt) else self._engine.detokenize_prompt(ids)
        )

    def check_length(self, num_tokens: int, field: str) -> None:
        """Raise :class:`InvalidArgument` for more tokens than the context has room for."""
        # One place is left for the token that is generated.
        longest = self._engine.model.max_context - 1
        if num_tokens > longest:
            allowed = f"at most {longest} tokens: the context holds {longest + 1}"
            raise InvalidArgument(field, f"{num_tokens} tokens", allowed)

    def _check_characters(self, prompt: Prompt, field: str) -> None:
        model = self._engine.model
        longest = model.max_context * model.max_characters_per_token
        if (size := _num_characters(prompt)) > longest:
            allowed = f"at most {longest} characters: the context holds {model.max_context} tokens"
            raise InvalidArgument(field, f"{size} characters", allowed)

    async def _in_thread(self, function: Callable[[], T], size: int) -> T:
        threads = self._threads_for_long if size > _LONG_TEXT else self._threads
        return await asyncio.get_running_loop().run_in_executor(threads, function)


def check_ids(ids: Sequence[int], field: str, vocab_size: int) -> None:
    """Raise :class:`InvalidArgument`, naming the entry of ``field``, for an id that is no token."""
    for i, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidArgument(f"{field}[{i}]", token_id, f"0 to {vocab_size - 1}")


def field_of(prompt: Prompt, text_field: str, ids_field: str) -> str:
    """Return the name of the field that a prompt came in."""
    match prompt:
        case TextPrompt():
            return text_field
        case TokenPrompt():
            return ids_field
        case ChatPrompt():
            return "chat.messages"


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _num_characters(prompt: Prompt) -> int:
    match prompt:
        case TextPrompt(text):
            return len(text)
        case ChatPrompt(messages):
            return sum(len(message["content"]) for message in messages)
        case TokenPrompt():
            return 0
