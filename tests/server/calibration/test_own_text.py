"""Text that a model writes itself, by a toy engine and with the demo model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pruning.text import load_texts
from pruning.transformers_model import load_tokenizer
from server.calibration.own_text import Beginning, OwnText, beginnings
from server.engine.base import EngineDead
from server.errors import FailedPrecondition
from server.model.source import DEMO_MODEL
from tests.fathom_command import fathom, fathom_in_process
from tests.server.rpc.toy_engine import BOS, EOS, ToyEngine, text_of

USER = b"user:"


class ToyTokenizer:
    """Bytes, as the toy engine has them."""

    bos_token_id: int | None = BOS
    eos_token_id: int | None = EOS
    chat_template: str | None = "a template"

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"{each['role']}:{each['content']}\n" for each in messages)

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=list(text.encode()))

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join("<bos>" if each == BOS else text_of(each) for each in token_ids)


@pytest.fixture
async def engine() -> ToyEngine:
    engine = ToyEngine()
    await engine.start()
    return engine


async def documents(engine: ToyEngine, num_tokens: int = 600, seed: int = 0) -> list[str]:
    own = OwnText(engine, ToyTokenizer())
    return await own.documents(num_tokens, 60, seed, lambda *_: None)


def test_a_text_begins_as_others_do_or_with_the_turn_of_a_user() -> None:
    tokenizer = ToyTokenizer()
    plain, turn = Beginning((BOS,), goes_on=False), Beginning(tuple(USER), goes_on=True)
    assert beginnings(tokenizer) == [plain, turn]
    tokenizer.bos_token_id = None
    assert beginnings(tokenizer) == [Beginning((EOS,), goes_on=False), turn]
    tokenizer.eos_token_id = None
    assert beginnings(tokenizer) == [turn]
    tokenizer.chat_template = None
    with pytest.raises(FailedPrecondition, match="neither a token that begins"):
        beginnings(tokenizer)


async def test_documents_are_read_as_they_were_written(engine: ToyEngine) -> None:
    """What is put in front of every text that is read is not in the text as well."""
    texts = await documents(engine)
    assert all("<bos>" not in text for text in texts)
    # All conversations of a model that takes no chances are the same.
    assert any(text.startswith("user:") for text in texts)
    for request in engine.requests:
        assert request.sampling.temperature == 1.0
        is_turn = bytes(request.prompt_ids) == USER if BOS not in request.prompt_ids else False
        assert request.sampling.ignore_eos == is_turn
        assert len(request.prompt_ids) + (request.sampling.max_tokens or 0) == 60


async def test_the_death_of_the_engine_is_one_error(engine: ToyEngine) -> None:
    """All documents that are being written fail."""
    engine.gate.clear()
    written = asyncio.create_task(documents(engine))
    await engine.until_running(600 // 60)
    engine.die()
    with pytest.raises(EngineDead, match="killed"):
        await written


async def test_there_are_as_many_tokens_as_wanted(engine: ToyEngine) -> None:
    steps: list[tuple[int, int]] = []
    own = OwnText(engine, ToyTokenizer())
    texts = await own.documents(600, 60, 0, lambda *step: steps.append(step))
    assert steps[-1] == (600, 600)
    assert steps == sorted(steps)
    assert sum(len(text.encode()) + 1 for text in texts) >= 600
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds == list(range(len(seeds)))


async def test_the_seed_is_that_of_the_first_document(engine: ToyEngine) -> None:
    await documents(engine, seed=100)
    assert engine.requests[0].sampling.seed == 100


async def test_a_model_that_ends_at_once_is_not_asked_for_ever(engine: ToyEngine) -> None:
    own = OwnText(engine, ToyTokenizer())
    with pytest.raises(FailedPrecondition, match="of 80 documents ended within 16 tokens"):
        await own.documents(100, 10, 0, lambda *_: None)


def test_the_demo_model_writes_documentation(tmp_path: Path) -> None:
    out = tmp_path / "own.jsonl"
    state = ("--state-dir", tmp_path / "state", "--dtype", "float32")
    result = fathom("own-text", "demo", out, "--tokens", "512", "--length", "64", *state)
    assert result.returncode == 0, result.stderr
    texts = load_texts(str(out))
    assert result.stdout == f"{len(texts)} documents written to {out}\n"
    assert "Writing: 100 %" in result.stderr
    tokenizer = load_tokenizer(DEMO_MODEL, trust=False)
    lengths = [len(tokenizer(text).input_ids) for text in texts]
    assert sum(lengths) > 256  # to read a text that was cut takes fewer tokens than to write it
    assert max(lengths) <= 64
    assert any("Return" in text for text in texts)


def test_a_file_in_no_directory_is_refused_at_once(tmp_path: Path) -> None:
    result = fathom_in_process("own-text", "demo", tmp_path / "none" / "own.jsonl")
    assert (result.returncode, result.stdout) == (2, "")
    assert "OUT: got " in result.stderr
