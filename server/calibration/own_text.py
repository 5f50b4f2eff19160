"""Text that a model writes itself, to rank its layers and fit its repair on.

Where no text of the users is at hand, a model's own is closer to what it will be asked for than any
text of one kind: it is of all the kinds that the model was trained on. Models have been pruned and
quantized on such text before (Williams et al., "Self-calibration for language model quantization
and pruning", arXiv 2410.17170).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.engine.base import (
    Engine,
    GenerationRequest,
    LayerSelection,
    ProgressCallback,
    SamplingOptions,
)
from server.errors import FailedPrecondition
from server.task_group import run_together

# A document that ends sooner says nothing of a layer.
_MIN_TOKENS = 16
# A model that ends all of its documents at once would be asked for ever.
_MAX_ROUNDS = 8
_MARK = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Beginning:
    """The tokens that documents begin with, and whether they go on after an end of text.

    A conversation does: the first end is that of the user's turn.
    """

    token_ids: tuple[int, ...]
    goes_on: bool


def beginnings(tokenizer: Any) -> list[Beginning]:
    """Return a plain beginning of a text and that of a user's turn, where the model has them.

    ``tokenizer`` is one of transformers. Raises :class:`FailedPrecondition` where there is none.
    """
    found = []
    first = tokenizer.bos_token_id
    if first is None:
        first = tokenizer.eos_token_id  # what separates texts in training
    if first is not None:
        found.append(Beginning((first,), goes_on=False))
    if tokenizer.chat_template:
        turn = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
        before = tokenizer(turn.partition(_MARK)[0], add_special_tokens=False).input_ids
        if before:
            found.append(Beginning(tuple(before), goes_on=True))
    if not found:
        raise FailedPrecondition(
            "model: its tokenizer has neither a token that begins or ends texts nor a chat "
            "template, so nothing can be written from nothing"
        )
    return found


class OwnText:
    """Documents that the dense model writes, each from one of its beginnings, in turns."""

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._beginnings = beginnings(tokenizer)

    async def documents(
        self, num_tokens: int, max_length: int, seed: int, progress: ProgressCallback
    ) -> list[str]:
        """Return documents of at most ``max_length`` tokens, ``num_tokens`` or more in all.

        None is longer than the model's context. They are sampled at temperature 1, document i with
        the seed ``seed + i``. A model that ends most of them at once may write less. Raises
        :class:`FailedPrecondition` if it ends all.
        """
        max_length = min(max_length, self._engine.model.max_context)
        documents: list[list[int]] = []
        written = number = 0

        async def write(number: int) -> None:
            nonlocal written
            token_ids = await self._write(number, max_length, seed)
            if len(token_ids) >= _MIN_TOKENS:
                documents[number] = token_ids
                written += len(token_ids)
                progress(min(written, num_tokens), num_tokens)

        for _ in range(_MAX_ROUNDS):
            if written >= num_tokens:
                break
            wanted = math.ceil((num_tokens - written) / max_length)
            documents += [[] for _ in range(wanted)]
            await run_together(map(write, range(number, number + wanted)))
            number += wanted
        if not written:
            raise FailedPrecondition(
                f"model: all of {number} documents ended within {_MIN_TOKENS} tokens, so it "
                "writes no text to calibrate on"
            )
        return [self._text(token_ids) for token_ids in documents if token_ids]

    async def _write(self, number: int, max_length: int, seed: int) -> list[int]:
        beginning = self._beginnings[number % len(self._beginnings)]
        token_ids = list(beginning.token_ids)
        request = GenerationRequest(
            f"own-text-{number}",
            token_ids.copy(),
            LayerSelection(),
            SamplingOptions(
                temperature=1.0,
                seed=seed + number,
                max_tokens=max(1, max_length - len(token_ids)),
                ignore_eos=beginning.goes_on,
            ),
        )
        async for delta in self._engine.generate(request):
            token_ids += delta.token_ids
        return token_ids

    def _text(self, token_ids: Sequence[int]) -> str:
        added = self._engine.tokenize("")  # what every text is begun with when it is read
        if added and list(token_ids[: len(added)]) == list(added):
            token_ids = token_ids[len(added) :]
        text: str = self._tokenizer.decode(token_ids)
        return text
