"""Prompts of clients, turned into token ids that fit the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from server.calls.generation import (
    ChatPrompt,
    Prompt,
    RenderedPrompt,
    Scoring,
    TextPrompt,
    TokenPrompt,
)
from server.engine.base import Engine
from server.errors import InvalidArgument
from server.serving.fair_queue import Claim, FairQueue
from server.serving.tokenizer_thread import TokenizerThread

T = TypeVar("T")

# Tokenizing longer texts takes so long that they are kept out of the way of short ones.
_LONG_TEXT_CHARACTERS = 65536
# A long text is tokenized in pieces of this size first, to see whether all of it could fit.
_PIECE_CHARACTERS = 65536
# Tokens are turned into text in pieces of this size; others get their turn in between.
_PIECE_TOKENS = 4096


class PromptReader:
    """Tokenizes prompts off the event loop, and refuses those that cannot fit beforehand.

    Work for a request waits in a queue that clients share, until the call ends or the deadline of
    its :class:`Claim` has passed. The engine must have been started.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._short = TokenizerThread("tokenizer")
        self._long = TokenizerThread("long-tokenizer")

    @property
    def queues(self) -> list[FairQueue]:
        """The queues in which requests wait for a tokenizer."""
        return [self._short.queue, self._long.queue]

    def close(self) -> None:
        self._short.close()
        self._long.close()

    async def read_to_generate(self, prompt: Prompt, claim: Claim) -> list[int]:
        """Return the ids of a prompt to be continued, at least one; see :meth:`read`."""
        match prompt:
            case TextPrompt(""):
                raise InvalidArgument("prompt", "", "at least one token")
            case ChatPrompt(()):
                raise InvalidArgument("chat.messages", [], "at least one message")
        fields = "prompt", "token_ids.ids"
        ids = await self.read(prompt, *fields, claim)
        if not ids:
            raise InvalidArgument(field_of(prompt, *fields), ids, "at least one token")
        return ids

    async def read_to_score(self, request: Scoring, claim: Claim) -> tuple[list[int], list[int]]:
        """Return the ids of the context, which may be none, and those of the text to score.

        Two texts are tokenized as one: a token that spans the end of the context is scored, too.
        Raises :class:`InvalidArgument` as :meth:`read` does, and if there is nothing to score.
        """
        context, continuation = request.context, request.continuation
        fields = "text", "token_ids.ids"
        field = field_of(continuation, *fields)
        if context is None:
            context_ids, ids = [], await self.read(continuation, *fields, claim)
        else:
            context_fields = "context_text", "context_ids.ids"
            context_ids = await self.read(context, *context_fields, claim)
            if not context_ids:
                raise InvalidArgument(field_of(context, *context_fields), "", "at least one token")
            if isinstance(context, TextPrompt) and isinstance(continuation, TextPrompt):
                joined = TextPrompt(context.text + continuation.text)
                whole = await self.read(joined, *fields, claim)
                num_shared = _num_shared(context_ids, whole)
                if num_shared == 0:
                    allowed = "at least one token that does not join with those of text"
                    raise InvalidArgument("context_text", context.text, allowed)
                context_ids, ids = whole[:num_shared], whole[num_shared:]
            else:
                ids = await self.read(continuation, *fields, claim, special_tokens=False)
        if len(context_ids) + len(ids) < 2 or not ids:
            allowed = "at least one token to score, after at least one token of context"
            raise InvalidArgument(field, f"{len(ids)} tokens", allowed)
        self.check_length(len(context_ids) + len(ids), field)
        return context_ids, ids

    async def read(
        self,
        prompt: Prompt,
        text_field: str,
        ids_field: str,
        claim: Claim,
        *,
        special_tokens: bool = True,
    ) -> list[int]:
        """Return the ids of a prompt, which may be none.

        Raises :class:`InvalidArgument`, naming the field that the prompt came in, for one that
        is longer than the context and for ids that are not in the vocabulary.
        """
        field = field_of(prompt, text_field, ids_field)
        if isinstance(prompt, TokenPrompt):
            self.check_length(len(prompt.ids), field)
        ids = await self._tokenize(prompt, field, claim, special_tokens=special_tokens)
        self.check_length(len(ids), field)
        check_ids(ids, field, self._engine.model.vocab_size)
        return ids

    async def tokenize(
        self, prompt: Prompt, claim: Claim, *, special_tokens: bool = True
    ) -> tuple[list[int], list[str]]:
        """Return the ids of a prompt, and the text of each token by itself.

        Raises :class:`InvalidArgument` for a prompt of more characters than the context holds,
        and for a long one of far more tokens.
        """
        field = field_of(prompt, "text", "token_ids.ids")
        ids = await self._tokenize(prompt, field, claim, special_tokens=special_tokens)
        unique = sorted(set(ids))
        texts: dict[int, str] = {}
        for piece in _pieces(unique, _PIECE_TOKENS):
            found = await self._run(claim, self._token_texts(piece), len(piece), len(ids))
            texts.update(zip(piece, found, strict=True))
        return ids, [texts[token_id] for token_id in ids]

    async def text(self, prompt: Prompt, ids: Sequence[int], claim: Claim) -> str:
        """Return the text of a prompt that has been read as ``ids``."""
        if isinstance(prompt, TextPrompt):
            return prompt.text
        decode = self._engine.detokenize_prompt
        return await self._run(claim, lambda: decode(ids), len(ids), len(ids))

    async def detokenize(self, token_ids: Sequence[int], claim: Claim) -> str:
        """Return the text of tokens, up to the character that they end within, if they do.

        Raises :class:`InvalidArgument` for ids that are not in the vocabulary, and for more of
        them than the context holds.
        """
        model = self._engine.model
        if len(token_ids) > model.max_context:
            allowed = f"at most {model.max_context} tokens, the context"
            raise InvalidArgument("token_ids.ids", f"{len(token_ids)} tokens", allowed)
        check_ids(token_ids, "token_ids.ids", model.vocab_size)
        return await self.text(TokenPrompt(()), token_ids, claim)

    def check_length(self, num_tokens: int, field: str) -> None:
        """Raise :class:`InvalidArgument` for more tokens than the context has room for."""
        longest = self._max_prompt_tokens
        if num_tokens > longest:
            raise InvalidArgument(field, f"{num_tokens} tokens", self._allowed_tokens)

    @property
    def _max_prompt_tokens(self) -> int:
        return self._engine.model.max_context - 1  # there must be room for a generated token

    @property
    def _allowed_tokens(self) -> str:
        longest = self._max_prompt_tokens
        return f"at most {longest} tokens: the context holds {longest + 1}"

    def _check_characters(self, prompt: Prompt, field: str) -> None:
        model = self._engine.model
        longest = model.max_context * model.max_characters_per_token
        if (size := _num_characters(prompt)) > longest:
            allowed = f"at most {longest} characters: the context holds {model.max_context} tokens"
            raise InvalidArgument(field, f"{size} characters", allowed)

    async def _check_pieces(self, text: str, field: str, claim: Claim) -> None:
        """Raise :class:`InvalidArgument` for a long text whose pieces have far too many tokens.

        Tokenizing the whole text could not be stopped half-way. Each cut adds at most a few
        tokens, so the pieces of a text that fits have far less than twice as many.
        """
        if len(text) <= _LONG_TEXT_CHARACTERS:
            return
        num_tokens = 0
        for piece in _pieces(text, _PIECE_CHARACTERS):
            ids = await self._run(claim, self._ids(piece, special_tokens=False), len(piece))
            num_tokens += len(ids)
            if num_tokens > 2 * self._max_prompt_tokens:
                raise InvalidArgument(field, f"about {num_tokens} tokens", self._allowed_tokens)

    async def _tokenize(
        self, prompt: Prompt, field: str, claim: Claim, *, special_tokens: bool
    ) -> list[int]:
        self._check_characters(prompt, field)
        match prompt:
            case TextPrompt(text):
                await self._check_pieces(text, field, claim)
                special_tokens = special_tokens and prompt.special_tokens
                ids = self._ids(text, special_tokens=special_tokens)
                return await self._run(claim, ids, len(text))
            case TokenPrompt(ids=token_ids):
                return list(token_ids)
            case ChatPrompt(messages):
                return await self._run(
                    claim, lambda: self._engine.tokenize_chat(messages), _num_characters(prompt)
                )
            case RenderedPrompt(render, num_characters):
                return await self._run(
                    claim,
                    lambda: self._engine.tokenize(render(), special_tokens=False),
                    num_characters,
                )

    def _ids(self, text: str, *, special_tokens: bool) -> Callable[[], list[int]]:
        return lambda: self._engine.tokenize(text, special_tokens=special_tokens)

    def _token_texts(self, ids: Sequence[int]) -> Callable[[], list[str]]:
        return lambda: self._engine.token_texts(ids)

    async def _run(
        self, claim: Claim, function: Callable[[], T], cost: int, size: int | None = None
    ) -> T:
        """Run a function in the thread for work of ``size``, by default ``cost``."""
        is_long = (cost if size is None else size) > _LONG_TEXT_CHARACTERS
        thread = self._long if is_long else self._short
        return await thread.run(claim, function, cost)


def _pieces(values: Sequence[T] | str, size: int) -> Iterator[Any]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def check_ids(ids: Sequence[int], field: str, vocab_size: int) -> None:
    """Raise :class:`InvalidArgument`, naming the entry of ``field``, for an unknown token id."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    i = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < vocab_size)
    raise InvalidArgument(f"{field}[{i}]", ids[i], f"0 to {vocab_size - 1}")


def field_of(prompt: Prompt, text_field: str, ids_field: str) -> str:
    """Return the name of the field that a prompt came in."""
    match prompt:
        case TextPrompt():
            return text_field
        case TokenPrompt():
            return ids_field
        case ChatPrompt() | RenderedPrompt():
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
        case RenderedPrompt(num_characters=num_characters):
            return num_characters
        case TokenPrompt():
            return 0
