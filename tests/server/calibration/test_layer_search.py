"""Searches for the layers to leave out."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from pruning.metrics import METRICS
from server.calibration.layer_search import LayerSearch, search_text_tokens
from server.calibration.search_store import SearchStore
from server.engine.base import EngineDead, LayerSelection
from server.errors import FailedPrecondition
from server.state import StateDirectory
from server.state_keys import Measuring
from tests.server.calibration.searched_engine import SearchedEngine, greedy_order, kl_without
from tests.server.rpc.toy_engine import NUM_LAYERS

WINDOWS = [list(range(30)), list(range(50, 80))]
TEXT_TOKENS = 60
ENOUGH = 100 * TEXT_TOKENS
GREEDY, SINGLE = METRICS["greedy_kl"], METRICS["single_removal_kl"]


async def started(num_lives: int | None = None) -> SearchedEngine:
    engine = SearchedEngine(num_lives)
    await engine.start()
    return engine


def store(directory: Path, model: str = "m") -> SearchStore:
    return SearchStore(
        StateDirectory(directory), Measuring(model, "t", "elastic", "float32", max_context=64)
    )


def search(
    engine: SearchedEngine,
    *,
    max_tokens: int = ENOUGH,
    repair: str | None = None,
    kept: SearchStore | None = None,
    steps: list[tuple[int, int]] | None = None,
) -> LayerSearch:
    return LayerSearch(
        engine,
        WINDOWS,
        max_tokens=max_tokens,
        repair=repair,
        kept=None if kept is None else kept.on(WINDOWS, repair),
        progress=lambda *step: None if steps is None else steps.append(step),
    )


async def test_greedy_removal_is_that_of_a_search_that_looks_at_everything() -> None:
    engine = await started()
    steps: list[tuple[int, int]] = []
    ranking = await search(engine, steps=steps).rank(GREEDY)
    half = NUM_LAYERS // 2
    assert list(ranking.removal_order[:half]) == greedy_order(half)
    for number in range(1, half + 1):
        removed = tuple(sorted(ranking.removal_order[:number]))
        last = ranking.removal_order[number - 1]
        assert ranking.scores[last] == pytest.approx(kl_without(removed))
    assert len(engine.measured) == len(set(engine.measured)), "nothing is measured twice"
    assert steps == sorted(steps)
    assert len({total for _, total in steps}) == 1
    assert steps[-1][0] == steps[-1][1] > 0
    assert all(done < total for done, total in steps[:-1])


async def test_single_removal_after_greedy_needs_no_measurement(tmp_path: Path) -> None:
    engine = await started()
    await search(engine, kept=store(tmp_path)).rank(GREEDY)
    num_measured = len(engine.measured)
    ranking = await search(engine, kept=store(tmp_path)).rank(SINGLE)
    assert ranking.scores == tuple(kl_without((layer,)) for layer in range(NUM_LAYERS))
    assert len(engine.measured) == num_measured


async def test_a_search_that_was_interrupted_anywhere_goes_on(tmp_path: Path) -> None:
    whole = await started()
    expected = await search(whole, kept=store(tmp_path / "whole")).rank(GREEDY)
    for lives in itertools.count(1):
        kept = store(tmp_path / str(lives))
        engine = await started(lives)
        try:
            await search(engine, kept=kept).rank(GREEDY)
        except EngineDead:
            again = await started()
            assert await search(again, kept=kept).rank(GREEDY) == expected
            assert engine.measured + again.measured == whole.measured
            assert engine.num_tokens_run + again.num_tokens_run == whole.num_tokens_run
        else:
            break
    assert lives > 4, "the search was to be interrupted in several places"


async def test_a_cancelled_search_stops_and_keeps_what_it_has_found(tmp_path: Path) -> None:
    engine = await started()
    steps: list[tuple[int, int]] = []
    running = asyncio.create_task(search(engine, kept=store(tmp_path), steps=steps).rank(GREEDY))
    while len(engine.measured) < NUM_LAYERS:
        await asyncio.sleep(0)
    engine.gate.clear()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    found = list(engine.measured)
    engine.gate.set()
    again = await started()
    await search(again, kept=store(tmp_path)).rank(GREEDY)
    assert not set(found) & set(again.measured)


async def test_what_is_kept_is_of_one_model_one_text_and_one_repair(tmp_path: Path) -> None:
    await search(await started(), kept=store(tmp_path)).rank(SINGLE)
    for kept, repair in ((store(tmp_path, "other"), None), (store(tmp_path), "sha256:maps")):
        engine = await started()
        await search(engine, kept=kept, repair=repair).rank(SINGLE)
        assert engine.measured == [
            LayerSelection((layer,), (layer,), repair) for layer in range(NUM_LAYERS)
        ]
    assert len(list(tmp_path.glob("search-*.json"))) == 3


async def test_damaged_entries_are_measured_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await search(await started(), kept=store(tmp_path)).rank(SINGLE)
    [path] = tmp_path.glob("search-*.json")
    path.write_text(path.read_text().replace("kl_nats", "kl_bits", 1))
    engine = await started()
    await search(engine, kept=store(tmp_path)).rank(SINGLE)
    assert len(engine.measured) == NUM_LAYERS
    assert f"{path} is not used and will be made anew" in caplog.text


@pytest.mark.parametrize("num_passes", [9, 10, 11, 13, 15, 40])
async def test_a_search_keeps_within_its_tokens(
    tmp_path: Path, num_passes: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    engine = await started()
    kept = store(tmp_path)
    ranking = await search(engine, max_tokens=num_passes * TEXT_TOKENS, kept=kept).rank(GREEDY)
    assert sorted(ranking.removal_order) == list(range(NUM_LAYERS))
    assert ranking.removal_order[0] == greedy_order(1)[0]
    assert engine.num_tokens_run <= num_passes * TEXT_TOKENS
    assert ("used up search_tokens" in caplog.text) == (num_passes < 40)
    num_measured = len(engine.measured)
    assert await search(engine, max_tokens=num_passes * TEXT_TOKENS, kept=kept).rank(GREEDY) == (
        ranking
    )
    assert len(engine.measured) == num_measured, "the tokens are used up at the next start, too"


async def test_too_few_tokens_to_look_at_every_layer() -> None:
    engine = await started()
    with pytest.raises(
        FailedPrecondition, match=r"^search_tokens: got 539, allowed: 540 or more, to look at each"
    ):
        search(engine, max_tokens=9 * TEXT_TOKENS - 1)


def test_tokens_of_text_that_fit_a_search() -> None:
    assert search_text_tokens(30, 1 << 19) == 3495
    assert search_text_tokens(80, 1024) == 64
