"""A model's tokenizer, as vLLM loads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from server.engine.chat_template import ChatTemplate
from server.errors import FailedPrecondition

logger = logging.getLogger(__name__)

# Any text whose tokens no tokenizer joins with special ones.
_PLAIN_TEXT = "a"
_REPLACEMENT_CHARACTER = "�"
# More than the four bytes of a character: tokens of zero bytes and special ones may lie between.
_MAX_PARTIAL_TOKENS = 16
_CACHED_TOKEN_TEXTS = 65536


class ModelTokenizer:
    """Turns texts and chats into token ids and back; fit for any thread."""

    def __init__(self, tokenizer: Any, model_name: str) -> None:
        self._tokenizer = tokenizer
        self._model_name = model_name
        self.token_text = lru_cache(_CACHED_TOKEN_TEXTS)(self._token_text)
        if self._appended:
            logger.warning(
                "the tokenizer of %s appends %s to every text; Fathom leaves it out, since text "
                "is to follow",
                model_name,
                tokenizer.convert_ids_to_tokens(list(self._appended)),
            )

    @property
    def max_characters_per_token(self) -> int:
        return int(self._tokenizer.max_chars_per_token)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that there may be a token for."""
        return int(self._tokenizer.max_token_id) + 1

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The id of each special token, which never shows in a text, by its name."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        named = {token.content: number for number, token in added.items() if token.special}
        names, ids = self._tokenizer.all_special_tokens, self._tokenizer.all_special_ids
        return named | dict(zip(names, ids, strict=True))

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return the ids of ``text``, after the special tokens that begin every text."""
        ids = self._encode(text, special_tokens=special_tokens)
        appended = len(self._appended)
        if special_tokens and appended and tuple(ids[-appended:]) == self._appended:
            del ids[-appended:]
        return ids

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the prompt that the chat template makes.

        Raises:
            FailedPrecondition: There is no template, or it fails whatever the messages are.
            InvalidArgument: The template refuses these messages or leaves one of the user out.
        """
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise FailedPrecondition(
                f"model {self._model_name} has no chat template; send a prompt or token ids"
            )
        text = self._chat_template.render(messages)
        return self._encode(text, special_tokens=False)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of ``token_ids``, without special tokens."""
        return self._decode(token_ids, skip_special_tokens=True)

    def detokenize_prompt(self, token_ids: Sequence[int]) -> str:
        """Return the text of a prompt, up to the character that it ends within, if it does.

        The text that is generated begins with that character.
        """
        num_complete = self.num_complete(token_ids)
        if num_complete is None:
            return self.detokenize(token_ids)
        whole = self.detokenize(token_ids[:num_complete])
        # A token may hold the end of one character and the beginning of the next. But where
        # characters are bytes in a row, one that is incomplete makes the others unreadable.
        text = self.detokenize(token_ids).rstrip(_REPLACEMENT_CHARACTER)
        return text if text.startswith(whole) else whole

    def num_complete(self, token_ids: Sequence[int]) -> int | None:
        """Return how many of ``token_ids`` make a text that ends with a whole character.

        None where that many would have to be left out that these bytes are no text.
        """
        for num_left_out in range(min(_MAX_PARTIAL_TOKENS, len(token_ids)) + 1):
            stop = len(token_ids) - num_left_out
            tail = token_ids[max(0, stop - _MAX_PARTIAL_TOKENS) : stop]
            if not self.detokenize(tail).endswith(_REPLACEMENT_CHARACTER):
                return stop
        return None

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return what each token adds to a text, the space before a word included."""
        return [self.token_text(token_id) for token_id in token_ids]

    @cached_property
    def _appended(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts after a text."""
        plain = self._encode(_PLAIN_TEXT, special_tokens=False)
        with_special = self._encode(_PLAIN_TEXT, special_tokens=True)
        for start in range(len(with_special) - len(plain) + 1):
            if with_special[start : start + len(plain)] == plain:
                return tuple(with_special[start + len(plain) :])
        return ()

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """Tokens that stand before the one whose text is asked for, and their text."""
        ids = self._encode(_PLAIN_TEXT, special_tokens=False)
        return ids, self._decode(ids)

    def _encode(self, text: str, *, special_tokens: bool) -> list[int]:
        from transformers import PreTrainedTokenizerBase

        # Quiet: a text to measure on may be longer than the context, because it is cut into
        # windows, and a prompt that is too long has an error of its own. Other tokenizers of vLLM
        # say nothing, and do not take the argument.
        quiet = {"verbose": False} if isinstance(self._tokenizer, PreTrainedTokenizerBase) else {}
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens, **quiet))

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self._model_name)

    def _token_text(self, token_id: int) -> str:
        # By itself a token would be the first one of a text, which has no space before it.
        ids, text = self._anchor
        together = self._decode([*ids, token_id])
        return (
            together.removeprefix(text) if together.startswith(text) else self._decode([token_id])
        )

    def _decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(
            self._tokenizer.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )
