"""Models whose weights are damaged, and whose tokenizer and embedding differ in size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.engine.base import GenerationRequest, LayerSelection, SamplingOptions
from server.errors import InvalidArgument, NonFiniteResult
from tests.server.engine.elastic.damaged_model import NUM_ROWS, damaged_model
from tests.server.engine.elastic.running_engine import RunningEngine, running_engine

DENSE = LayerSelection()
SOUND = LayerSelection((2,), (2,))


@pytest.fixture(scope="module")
def engine(
    stories_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningEngine]:
    """Layer 2 has a NaN, the embedding 8 rows without a token, and the tokenizer marks words."""
    directory = damaged_model(stories_model, tmp_path_factory.mktemp("models") / "damaged")
    with running_engine(directory) as running:
        yield running


def generate(engine: RunningEngine, layers: LayerSelection, **sampling: Any) -> list[int]:
    async def run() -> list[int]:
        options = SamplingOptions(temperature=0.0, max_tokens=8, ignore_eos=True, **sampling)
        request = GenerationRequest("request", [1, 403, 407], layers, options)
        return [i async for delta in engine.engine.generate(request) for i in delta.token_ids]

    return engine.run(run())


def test_nan_is_an_error_that_names_the_depth_and_ends_no_other_request(
    engine: RunningEngine,
) -> None:
    sound = generate(engine, SOUND)
    for sampling in ({}, {"logprobs": 2}):
        with pytest.raises(NonFiniteResult, match="at depth 5 "):
            generate(engine, DENSE, **sampling)
    with pytest.raises(NonFiniteResult, match="at prefill depth 4 and decode depth 5 "):
        generate(engine, LayerSelection((2,), ()))
    with pytest.raises(NonFiniteResult, match="at depth 5 "):
        engine.run(engine.engine.score("score", [1, 403, 407], 1, DENSE))
    assert generate(engine, SOUND) == sound
    assert engine.engine.is_alive


def test_quality_that_is_not_finite_names_the_depth(engine: RunningEngine) -> None:
    windows = [list(range(3, 40)), list(range(50, 87))]
    with pytest.raises(NonFiniteResult, match="at depth 5 "):
        engine.run(engine.engine.measure_quality(windows, [DENSE], lambda *_: None))


def test_an_end_of_text_that_is_no_token_does_not_end_the_engine(engine: RunningEngine) -> None:
    plain = generate(engine, SOUND)
    assert generate(engine, SOUND, min_tokens=4) == plain
    assert generate(engine, SOUND, min_tokens=4, stop_token_ids=(plain[0],))[0] != plain[0]
    assert engine.engine.is_alive


def test_ids_without_a_token_do_not_end_the_engine(engine: RunningEngine) -> None:
    assert engine.engine.model.vocab_size == 512, "which is what requests are checked by"
    scores = engine.run(engine.engine.score("score", [1, 403, 515, 407], 1, SOUND))
    assert [score.token_id for score in scores] == [403, 515, 407]
    assert scores[1].text == ""
    # All of them, those without a token too, are among the most likely ones.
    assert len(generate(engine, SOUND, logprobs=20)) == 8
    assert engine.engine.is_alive


@pytest.mark.parametrize("token_id", [-1, 512, NUM_ROWS, 1 << 40])
def test_ids_to_measure_on_are_checked(engine: RunningEngine, token_id: int) -> None:
    windows = [[1, 403, token_id, 407], [1, 2, 3, 4]]
    message = rf"text: got 'token id {token_id}', allowed: .*0 to 511"
    with pytest.raises(InvalidArgument, match=message):
        engine.run(engine.engine.measure_importance(windows, lambda *_: None))
    with pytest.raises(InvalidArgument, match=message):
        engine.run(engine.engine.measure_quality(windows, [DENSE], lambda *_: None))
    assert engine.engine.is_alive
