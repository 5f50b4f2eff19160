"""Tokenization of long prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from server.calls.generation import TextPrompt, TokenPrompt
from server.engine.base import ModelInfo
from server.errors import DeadlineTooSoon, InvalidArgument
from server.serving.fair_queue import Claim
from server.serving.prompts import PromptReader, check_ids
from tests.server.rpc.toy_engine import BOS, MODEL, ToyEngine


class LongContext(ToyEngine):
    """An engine with a long context; a token has up to 4 characters."""

    def __init__(self, max_context: int) -> None:
        super().__init__()
        self._model = replace(MODEL, max_context=max_context, max_characters_per_token=16)
        self.lengths: list[int] = []

    @property
    def model(self) -> ModelInfo:
        return self._model

    def tokenize(self, text: str, *, special_tokens: bool = True) -> list[int]:
        self.lengths.append(len(text))
        return super().tokenize(text[::4], special_tokens=special_tokens)


async def test_a_long_text_that_fits_is_tokenized_as_a_whole() -> None:
    engine = LongContext(2**16)
    await engine.start()
    reader = PromptReader(engine)
    text = "abcd" * 60_000
    ids = await reader.read(TextPrompt(text), "prompt", "token_ids.ids", Claim())
    assert ids == [BOS, *text[::4].encode()]
    assert engine.lengths[-1] == len(text)
    assert max(engine.lengths[:-1]) == 65536


@pytest.mark.parametrize("num_tokens", [65536, 65535, 2**17 - 10])
async def test_a_long_text_that_does_not_quite_fit_is_refused_to_the_token(num_tokens: int) -> None:
    engine = LongContext(2**16)
    await engine.start()
    prompt = TextPrompt("abcd" * (num_tokens - 1))
    reading = PromptReader(engine).read(prompt, "prompt", "token_ids.ids", Claim())
    if num_tokens < 2**16:
        assert len(await reading) == num_tokens
        return
    with pytest.raises(InvalidArgument, match=rf"prompt: got '{num_tokens} tokens', allowed"):
        await reading


async def test_of_a_text_that_is_far_too_long_only_pieces_are_tokenized() -> None:
    engine = LongContext(2**16)
    await engine.start()
    reader = PromptReader(engine)
    prompt = TextPrompt("abcd" * 2**18)
    for reading in (
        reader.read(prompt, "prompt", "token_ids.ids", Claim()),
        reader.tokenize(prompt, Claim()),
    ):
        engine.lengths.clear()
        with pytest.raises(InvalidArgument, match=r"got 'about 131072 tokens'"):
            await reading
        assert set(engine.lengths) == {65536}
        assert sum(engine.lengths) < len(prompt.text)


async def test_a_text_beyond_any_tokenizer_is_not_tokenized_at_all() -> None:
    engine = LongContext(2**10)
    await engine.start()
    reader = PromptReader(engine)
    prompt = TextPrompt("x" * (2**14 + 1))
    for reading in (
        reader.read(prompt, "prompt", "token_ids.ids", Claim()),
        reader.tokenize(prompt, Claim()),
    ):
        with pytest.raises(InvalidArgument, match="allowed: at most 16384 characters"):
            await reading
    assert engine.lengths == []


async def test_nothing_is_tokenized_after_a_deadline() -> None:
    engine = LongContext(2**16)
    await engine.start()
    with pytest.raises(DeadlineTooSoon):
        await PromptReader(engine).tokenize(TextPrompt("late"), Claim(deadline=0.0))
    assert engine.lengths == []


async def test_texts_of_tokens_are_made_once_for_each_id(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LongContext(2**16)
    await engine.start()
    asked: list[int] = []
    one_by_one = engine.token_texts

    def noted(ids: Sequence[int]) -> list[str]:
        asked.extend(ids)
        return one_by_one(ids)

    monkeypatch.setattr(engine, "token_texts", noted)
    ids, texts = await PromptReader(engine).tokenize(TextPrompt("abcdefgh" * 1000), Claim())
    assert ids == [BOS, *b"ae" * 1000]
    assert texts == ["", *"ae" * 1000]
    assert sorted(asked) == [*b"ae", BOS]


async def test_ids_beyond_the_context_are_counted_before_anything_else() -> None:
    engine = LongContext(16)
    await engine.start()
    prompt = TokenPrompt((10**9,) * 16)
    with pytest.raises(
        InvalidArgument, match=r"token_ids.ids: got '16 tokens', allowed: at most 15"
    ):
        await PromptReader(engine).read(prompt, "prompt", "token_ids.ids", Claim())


def test_the_first_id_that_is_none_is_named() -> None:
    check_ids([], "ids", 10)
    check_ids([0, 9], "ids", 10)
    for ids in ([0, 10, 11], [0, -1, 3]):
        with pytest.raises(InvalidArgument, match=r"ids\[1\]: got "):
            check_ids(ids, "ids", 10)
