"""Texts that a real engine generates, and the reported reason why they ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.calls.generation import Scoring, TextPrompt
from server.engine.base import (
    FinishReason,
    GenerationRequest,
    LayerSelection,
    SamplingOptions,
)
from server.errors import InvalidArgument
from server.model.source import DEMO_MODEL
from server.serving.fair_queue import Claim
from server.serving.prompts import PromptReader
from tests.server.engine.elastic.running_engine import RunningEngine, running_engine

FULL_STOP = 14


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]
    reason: FinishReason | None
    stopped_by: str | int | None


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningEngine]:
    """The demo model, whose full stop is a special token and a second end of its texts."""
    model = tmp_path_factory.mktemp("texts") / "demo"
    shutil.copytree(DEMO_MODEL, model, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = model / "generation_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(
        json.dumps({**config, "eos_token_id": [0, FULL_STOP], "do_sample": False}), "utf-8"
    )
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    assert tokenizer["model"]["vocab"]["."] == FULL_STOP
    special = {**tokenizer["added_tokens"][0], "id": FULL_STOP, "content": "."}
    tokenizer["added_tokens"].append(special)
    path.write_text(json.dumps(tokenizer), "utf-8")
    with running_engine(model, compile_layers=False) as running:
        yield running


def answer(running: RunningEngine, prompt_ids: list[int], **options: Any) -> Answer:
    chosen = SamplingOptions(**({"max_tokens": 24} | options))
    request = GenerationRequest("texts", prompt_ids, LayerSelection(), chosen)

    async def run() -> Answer:
        deltas = [delta async for delta in running.engine.generate(request)]
        ids = [i for delta in deltas for i in delta.token_ids]
        text = "".join(delta.text for delta in deltas)
        return Answer(text, ids, deltas[-1].finish_reason, deltas[-1].stopped_by)

    return running.run(run())


def test_a_prompt_that_ends_within_a_character(engine: RunningEngine) -> None:
    tokenizer = engine.engine.tokenize
    ids = tokenizer("Return the list of 😀")
    for cut in (1, 2, 3):
        prompt = ids[:-cut]
        free = answer(engine, prompt, ignore_eos=True)
        echo = engine.engine.detokenize_prompt(prompt)
        assert echo == "Return the list of "
        assert "Return" not in free.text
        whole = engine.engine.detokenize_prompt([*prompt, *free.token_ids])
        assert echo + free.text == whole
        # A stop string that stands in the prompt alone stops nothing.
        assert answer(engine, prompt, ignore_eos=True, stop=("Return the",)) == free


def test_without_sampling_in_its_configuration_a_model_is_greedy(engine: RunningEngine) -> None:
    prompt = engine.engine.tokenize("Return the list of")
    greedy = answer(engine, prompt, temperature=0.0)
    assert [answer(engine, prompt, seed=seed) for seed in range(3)] == [greedy] * 3


def test_an_end_of_text_is_no_stop_token_unless_the_request_names_it(
    engine: RunningEngine,
) -> None:
    prompt = engine.engine.tokenize("Return the")
    ended = answer(engine, prompt)
    assert ended.token_ids[-1] == FULL_STOP
    assert (ended.reason, ended.stopped_by) == (FinishReason.STOP, None)
    named = answer(engine, prompt, stop_token_ids=(FULL_STOP,))
    assert (named.token_ids, named.stopped_by) == (ended.token_ids, FULL_STOP)


def test_a_stop_string_that_is_a_special_token(engine: RunningEngine) -> None:
    prompt = engine.engine.tokenize("Return the")
    stopped = answer(engine, prompt, ignore_eos=True, stop=(".",))
    assert (stopped.reason, stopped.stopped_by) == (FinishReason.STOP, ".")
    assert stopped.token_ids.index(FULL_STOP) == len(stopped.token_ids) - 1
    assert "." not in stopped.text
    with_stop = answer(engine, prompt, ignore_eos=True, stop=(".",), include_stop=True)
    assert with_stop.text == stopped.text + "."
    # It is reported though the model's own end of text would have done.
    assert answer(engine, prompt, stop=(".",)) == stopped
    with pytest.raises(InvalidArgument, match="special tokens are no part of the text"):
        answer(engine, prompt, stop=("module.",))


def test_context_and_text_are_scored_as_the_text_that_they_make(engine: RunningEngine) -> None:
    reader = PromptReader(engine.engine)
    try:
        for context, text in (
            ("Return the list of obj", "ects."),
            ('She said "', "hello"),
            ("Return ", "the list"),
        ):
            scoring = Scoring(TextPrompt(text), TextPrompt(context))
            context_ids, ids = engine.run(reader.read_to_score(scoring, Claim()))
            assert context_ids + ids == engine.engine.tokenize(context + text)
            own = engine.engine.tokenize(context)
            assert context_ids == own[: len(context_ids)]
    finally:
        reader.close()


def test_texts_of_scores_have_their_spaces(engine: RunningEngine) -> None:
    ids = engine.engine.tokenize("Return the list of objects")
    scores = engine.run(engine.engine.score("spaces", ids, 1, LayerSelection()))
    assert "".join(score.text for score in scores) == "Return the list of objects"


@pytest.mark.parametrize("pre_tokenizer", [None, {"type": "Metaspace", "replacement": "▁"}])
def test_rows_of_the_embedding_that_are_no_tokens(
    pre_tokenizer: object, stories_model: Path, tmp_path: Path
) -> None:
    """Embeddings are often padded: such ids can be scored, and be among the most likely ones."""
    model = tmp_path / "padded"
    shutil.copytree(stories_model, model, copy_function=shutil.copyfile)
    weights = load_file(stories_model / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, 4 * embedding[300:308]])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    for name, changes in (
        ("config.json", {"vocab_size": 520}),
        ("tokenizer.json", {"pre_tokenizer": pre_tokenizer}),
    ):
        content = json.loads((stories_model / name).read_text("utf-8"))
        (model / name).write_text(json.dumps({**content, **changes}), "utf-8")
    with running_engine(model, compile_layers=False) as running:
        for number in range(2):
            scores = running.run(
                running.engine.score(f"padded-{number}", [1, 403, 515, 407], 1, LayerSelection())
            )
            assert [score.token_id for score in scores] == [403, 515, 407]
            assert scores[1].text == ""
        found = answer(running, [1, 403, 407], temperature=0.0, logprobs=20, ignore_eos=True)
        assert len(found.token_ids) == 24
        assert running.engine.is_alive
