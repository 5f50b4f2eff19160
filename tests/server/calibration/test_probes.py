"""Probes of writing and choosing, measured with a toy engine."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from dataclasses import replace

import pytest

from pruning.probes import Continuations, Probes, choices, choosing, passages, pieces, writing
from server.calibration import probes as design
from server.calibration.probes import Prober
from server.engine.base import EngineDead, LayerSelection, ModelInfo
from server.engine.pace import measuring_after
from tests.server.rpc.toy_engine import BOS, MODEL, ToyEngine, expected_tokens, logprob

DENSE = LayerSelection()
PRUNED = LayerSelection((1, 2), (1, 2))
MIXED = LayerSelection((1, 2, 5), (1,))


def windows(num_tokens: int = 400, num_windows: int = 6) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(256) for _ in range(num_tokens)] for _ in range(num_windows)]


@pytest.fixture
async def engine() -> ToyEngine:
    engine = ToyEngine()
    await engine.start()
    return engine


class ShortContext(ToyEngine):
    @property
    def model(self) -> ModelInfo:
        return replace(MODEL, max_context=64)


def written(layers: LayerSelection, has_dense: bool = True) -> Continuations:
    """Continue the prompts token by token, and let the dense model read them."""
    prompts = [[BOS, *piece.token_ids] for piece in pieces(windows(), 32, at_least=8, at_most=16)]
    texts = [tuple(expected_tokens(prompt, layers, 48)) for prompt in prompts]
    if not has_dense:
        return Continuations(tuple(texts), None)
    losses = [
        -math.fsum(logprob([*prompt, *text[:i]], text[i], DENSE) for i in range(len(text)))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return Continuations(tuple(texts), tuple(losses))


ITEMS = passages(windows(), num_context=24, num_continued=8, at_least=16, at_most=64)


def chosen(layers: LayerSelection) -> list[int]:
    return choices(
        [
            [
                math.fsum(
                    logprob([BOS, *item.context, *each[:i]], each[i], layers)
                    for i in range(len(each))
                )
                for each in item.continuations
            ]
            for item in ITEMS
        ]
    )


def expected(layers: LayerSelection) -> Probes:
    return Probes(
        writing(written(layers), written(DENSE)), choosing(ITEMS, chosen(layers), chosen(DENSE))
    )


def ignore(done: int, total: int) -> None:
    pass


async def test_against_a_direct_computation(engine: ToyEngine) -> None:
    seen: list[tuple[int, int]] = []
    prober = Prober(engine, windows(), [BOS])
    selections = [PRUNED, DENSE, MIXED]
    found = await prober.run(selections, lambda *each: seen.append(each), has_dense=True)
    assert found == [expected(layers) for layers in selections]
    (_, dense, _) = found
    assert dense.writing is not None
    assert dense.choosing is not None
    assert (dense.writing.ratio, dense.choosing.agreement) == (1.0, 1.0)
    total = 3 * (2 * 16 + 4 * len(ITEMS))
    assert seen == [(done, total) for done in range(1, total + 1)]
    assert engine.max_running == 16, "the rest of the batch is left to clients"
    assert {request.cache_namespace for request in engine.requests} == {None}
    assert set(engine.score_namespaces) == {None}


async def test_each_request_waits_for_its_turn_beside_those_of_clients(engine: ToyEngine) -> None:
    opened = asyncio.Semaphore(0)

    async def gate() -> None:
        await opened.acquire()

    seen: list[tuple[int, int]] = []
    prober = Prober(engine, windows(), [BOS])
    with measuring_after(gate):
        run = asyncio.create_task(
            prober.run([PRUNED], lambda *each: seen.append(each), has_dense=True)
        )
    for number in range(3):
        while len(seen) < number:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert len(engine.requests) == len(seen) == number, "the next one waits"
        opened.release()
    for _ in range(2 * (2 * 16 + 4 * len(ITEMS))):
        opened.release()
    assert await run == [expected(PRUNED)]


async def test_the_dense_model_is_measured_once(engine: ToyEngine) -> None:
    prober = Prober(engine, windows(), [BOS])
    first = await prober.run([DENSE], ignore, has_dense=True)
    num_requests = len(engine.requests)
    assert await prober.run([DENSE], ignore, has_dense=True) == first
    assert len(engine.requests) == num_requests
    assert await prober.run([PRUNED], ignore, has_dense=True) == [expected(PRUNED)]
    assert len(engine.requests) == 2 * num_requests


async def test_without_a_dense_model(engine: ToyEngine) -> None:
    (found,) = await Prober(engine, windows(), [BOS]).run([PRUNED], ignore, has_dense=False)
    assert found == Probes(
        writing(written(PRUNED, has_dense=False), None), choosing(ITEMS, chosen(PRUNED), None)
    )
    assert {request.layers for request in engine.requests} == {PRUNED}


async def test_too_little_text_leaves_a_probe_out(
    engine: ToyEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Eight prompts can be cut, but no sixteen passages."""
    prober = Prober(engine, windows(num_tokens=64, num_windows=4), [BOS])
    assert caplog.messages == [
        "choosing is not measured: the held-out text has 256 tokens in 4 windows, which give 8 "
        "pieces of 32 tokens, allowed: 16 or more, which takes 512 tokens or more"
    ]
    (found,) = await prober.run([PRUNED], ignore, has_dense=True)
    assert found.choosing is None
    assert found.writing is not None
    assert found.writing.num_prompts == 8

    prober = Prober(engine, windows(num_tokens=40, num_windows=2), [BOS])
    assert "writing is not measured: the held-out text has 80 tokens" in caplog.text
    num_requests = len(engine.requests)
    assert await prober.run([PRUNED, DENSE], ignore, has_dense=True) == [Probes(None, None)] * 2
    assert len(engine.requests) == num_requests


async def test_a_short_context_leaves_a_probe_out(caplog: pytest.LogCaptureFixture) -> None:
    engine = ShortContext()
    await engine.start()
    needed = 1 + design.PROMPT_TOKENS + design.GENERATED_TOKENS + 1
    prober = Prober(engine, windows(), [BOS])
    assert caplog.messages == [
        f"writing is not measured: max_context: got 64, allowed: {needed} or more, which a prompt "
        "and its continuation take"
    ]
    (found,) = await prober.run([PRUNED], ignore, has_dense=True)
    assert found == Probes(None, expected(PRUNED).choosing)


async def test_an_engine_that_dies_leaves_nothing_running(engine: ToyEngine) -> None:
    prober = Prober(engine, windows(), [BOS])

    def die(done: int, total: int) -> None:
        if done == 5:
            engine.die()

    with pytest.raises(EngineDead):
        await prober.run([PRUNED], die, has_dense=True)
    assert engine.load().num_running == 0
    await engine.start()
    assert await prober.run([PRUNED], ignore, has_dense=True) == [expected(PRUNED)]


async def test_nothing_is_logged_where_nothing_is_left_out(
    engine: ToyEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        Prober(engine, windows(), [BOS])
    assert caplog.messages == []
