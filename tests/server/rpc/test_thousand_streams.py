"""A thousand streams at once and more: each ends, and none is lost."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2
from server.serving.service_state import State
from tests.faults.outcomes import Asked, Crowd, Outcome
from tests.server.rpc.conftest import Deployment
from tests.server.rpc.toy_engine import BOS, expected_tokens

NUM_STREAMS = 1000
NUM_CONNECTIONS = 4
NUM_TOKENS = 12


def thousand(deployment: Deployment) -> list[Asked]:
    policy = deployment.service.policy
    asked = []
    for i in range(NUM_STREAMS):
        depth, prompt = 1 + i % 8, f"prompt {i % 10}"
        request = inference_pb2.GenerateRequest(
            prompt=prompt,
            stop=inference_pb2.StopConditions(max_tokens=NUM_TOKENS, ignore_eos=True),
            output=inference_pb2.OutputOptions(token_ids=True),
        )
        request.depth.layers = depth
        layers = policy.selection(type(policy.dense)(depth, depth))
        expected = expected_tokens([BOS, *prompt.encode()], layers, NUM_TOKENS)
        asked.append(Asked(request, tuple(expected), is_stream=i % 5 > 0))
    return asked


@pytest.mark.parametrize("starting", [{"max_running": 72}], indirect=True)
@pytest.mark.parametrize("dies", [False, True])
async def test_all_end_and_none_is_lost(deployment: Deployment, dies: bool) -> None:
    asked = thousand(deployment)
    async with AsyncExitStack() as stack:
        crowds = [
            Crowd(await stack.enter_async_context(AsyncClient(deployment.address)))
            for _ in range(NUM_CONNECTIONS)
        ]
        outcomes = await asyncio.gather(
            *[
                crowd.send(
                    asked[i::NUM_CONNECTIONS],
                    deployment.engine.die if dies and i == 0 else lambda: None,
                    after=10,
                )
                for i, crowd in enumerate(crowds)
            ]
        )
    assert [problem for crowd in crowds for problem in crowd.problems or ()] == []
    total = sum((outcome for outcome in outcomes[1:]), outcomes[0])
    assert total.total() == NUM_STREAMS
    if dies:
        # Those that the engine was at; the others were answered by the next one.
        assert 0 < total[Outcome.REFUSED] <= 72
        assert deployment.engine.num_starts == 2
    else:
        assert total == {Outcome.ANSWERED: NUM_STREAMS}
    assert deployment.engine.max_running <= 72
    assert deployment.service.state is State.SERVING
    assert deployment.service.status().load.num_waiting == 0


async def test_no_call_is_dropped_while_the_server_is_busy(deployment: Deployment) -> None:
    """All are sent before the event loop, which is this one, takes the first."""
    statuses = await asyncio.gather(
        *[deployment.client.control.GetStatus(control_pb2.GetStatusRequest()) for _ in range(4000)]
    )
    assert all(status.state == control_pb2.GetStatusResponse.STATE_SERVING for status in statuses)
