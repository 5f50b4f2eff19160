"""Requests that fail in an engine that goes on running."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from server.engine.base import (
    EngineDead,
    FinishReason,
    GenerationDelta,
    SamplingOptions,
    TokenScore,
)
from server.engine.vllm_client import VllmClient
from server.errors import FathomError, InvalidArgument, NonFiniteResult, RequestFailed


class FailingLlm:
    """Stands in for vLLM's client, which cannot be made to fail in these ways."""

    def __init__(self, *steps: object, errored: bool = False) -> None:
        self.errored = errored
        self._steps = steps

    async def generate(self, *request: object) -> AsyncIterator[object]:
        for step in self._steps:
            if isinstance(step, Exception):
                raise step
            yield step


def step(
    finish_reason: str | None = None, *, logprob: float | None = None, is_corrupted: bool = False
) -> Any:
    """Return an output of vLLM's with one token."""
    chosen = SimpleNamespace(rank=1, logprob=logprob, decoded_token="a")
    completion = SimpleNamespace(
        text="a",
        token_ids=[7],
        logprobs=None if logprob is None else [{7: chosen}],
        finish_reason=finish_reason,
        stop_reason=None,
    )
    metrics = SimpleNamespace(is_corrupted=is_corrupted, scheduled_ts=0.0, queued_ts=0.0)
    prompt_logprobs = None if logprob is None else [None, {7: chosen}]
    return SimpleNamespace(
        outputs=[completion],
        metrics=metrics,
        num_cached_tokens=0,
        prompt_logprobs=prompt_logprobs,
    )


def client_of(*steps: object, errored: bool = False) -> VllmClient:
    client = VllmClient()
    client._llm = FailingLlm(*steps, errored=errored)  # type: ignore[assignment]
    tokenizer: Any = SimpleNamespace(special_tokens={}, token_text=lambda token_id: "a")
    client._tokenizer = tokenizer
    return client


async def generate(client: VllmClient) -> list[GenerationDelta]:
    options = SamplingOptions(logprobs=0)
    deltas = client.generate("r", [1, 7], options, cache_salt="s", depth="depth 3")
    return [delta async for delta in deltas]


async def score(client: VllmClient) -> list[TokenScore]:
    params: Any = SimpleNamespace()
    return await client.prompt_scores("r", [1, 7], params, cache_salt="s", depth="depth 3")


def caused(cause: Exception) -> EngineGenerateError:
    error = EngineGenerateError()
    error.__cause__ = cause
    return error


async def test_what_succeeds_is_passed_on() -> None:
    deltas = await generate(client_of(step(logprob=-1.0), step("stop", logprob=-2.0)))
    assert [delta.finish_reason for delta in deltas] == [None, FinishReason.STOP]
    assert [score.logprob for score in await score(client_of(step("length", logprob=-1.0)))] == [-1]


@pytest.mark.parametrize("call", [generate, score])
@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_request_that_the_engine_gives_up_is_no_dead_engine(call: Any, reason: str) -> None:
    with pytest.raises(RequestFailed, match=f"given up the request.*{reason}"):
        await call(client_of(step(), step(reason)))
    with pytest.raises(EngineDead):
        await call(client_of(step(), step(reason), errored=True))


@pytest.mark.parametrize("call", [generate, score])
@pytest.mark.parametrize(
    ("raised", "errored", "expected", "message"),
    [
        (EngineDeadError(), True, EngineDead, "process has ended"),
        (caused(KeyError("block 7")), False, RequestFailed, "could not run.*block 7"),
        (caused(KeyError("block 7")), True, EngineDead, "process has ended"),
        (caused(ValueError("too long")), False, InvalidArgument, "too long"),
    ],
)
async def test_what_vllm_raises_is_told_in_the_terms_of_the_server(
    call: Any, raised: Exception, errored: bool, expected: type[Exception], message: str
) -> None:
    with pytest.raises(expected, match=message):
        await call(client_of(raised, errored=errored))
    assert issubclass(expected, FathomError) or expected is EngineDead


@pytest.mark.parametrize("call", [generate, score])
@pytest.mark.parametrize(
    "bad", [step(is_corrupted=True), step(logprob=float("nan")), step(logprob=float("-inf"))]
)
async def test_what_is_not_finite_names_the_depth(call: Any, bad: object) -> None:
    with pytest.raises(NonFiniteResult, match=r"at depth 3 .* not finite"):
        await call(client_of(bad))
