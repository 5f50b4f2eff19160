"""A model's tokenizer, as vLLM loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from server.errors import FailedPrecondition, InvalidArgument


class ModelTokenizer:
    """Turns texts and chats into token ids and back; fit for any thread."""

    def __init__(self, tokenizer: Any, model_name: str) -> None:
        self._tokenizer = tokenizer
        self._model_name = model_name

    @property
    def max_characters_per_token(self) -> int:
        return int(self._tokenizer.max_chars_per_token)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that there may be a token for."""
        return int(self._tokenizer.max_token_id) + 1

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=special_tokens))

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the prompt that the chat template makes.

        Raises:
            FailedPrecondition: There is no template.
            InvalidArgument: The template refuses these messages.
        """
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise FailedPrecondition(
                f"model {self._model_name} has no chat template; send a prompt or token ids"
            )
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except TemplateError as error:
            roles = [message.get("role") for message in messages]
            raise InvalidArgument(
                "chat.messages", roles, f"what the model's chat template takes ({error})"
            ) from error
        return list(ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.decode([token_id]) for token_id in token_ids]
