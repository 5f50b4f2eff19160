"""A server whose engine is spread over two processes, one of which is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from server.rpc.client import CallError, Client
from server.rpc.generated.fathom.v1 import inference_pb2
from tests.e2e.calls import at_once, failure, greedy_request, requested
from tests.e2e.running_server import PATIENCE, RunningServer, running_server
from tests.e2e.watcher import Watcher

DEPTHS = (5, 3, 1)

pytestmark = pytest.mark.skipif(
    (torch.cuda.is_available() and torch.cuda.device_count() < 2)
    or (not torch.cuda.is_available() and len(os.sched_getaffinity(0)) < 2),
    reason="two ranks need two GPUs, or two cores",
)


def ranks_of(server: RunningServer) -> list[psutil.Process]:
    """Return the processes that hold a part of the model."""
    cores = {process.pid for process in server.engine_processes()}
    return [
        child
        for core in cores
        for child in psutil.Process(core).children(recursive=True)
        if child.pid not in cores and "resource_tracker" not in " ".join(child.cmdline())
    ]


def test_a_rank_that_is_killed_under_load(
    stories_model: Path, stories_client: Client, tmp_path: Path
) -> None:
    def answers(client: Client) -> list[list[int]]:
        requests = [greedy_request("Once upon a time", 24, depth=depth) for depth in DEPTHS]
        return [list(each.token_ids) for each in at_once(client.generate, requests)]

    # Both servers rank the layers alike, which the answers show.
    expected = answers(stories_client)
    with (
        running_server(tmp_path, model=stories_model, tensor_parallel_size=2) as server,
        server.client() as client,
        Watcher(server.address) as watcher,
    ):
        watcher.wait_for("SERVING")
        assert answers(client) == expected
        old = ranks_of(server)
        assert len(old) == 2

        def begin(depth: int) -> Iterator[inference_pb2.GenerateStreamResponse]:
            stream = client.generate_stream(greedy_request("Once upon a time", 400, depth=depth))
            assert next(stream).prompt_info.served == requested(depth, depth)
            assert next(stream).delta.token_ids
            return stream

        streams = at_once(begin, DEPTHS * 3)
        old[1].kill()
        errors: list[CallError] = at_once(lambda stream: failure(lambda: list(stream)), streams)
        assert {error.code for error in errors} == {"UNAVAILABLE"}
        assert all(error.retry_after for error in errors)
        watcher.wait_for("SERVING", "NOT_SERVING", "SERVING")
        assert answers(client) == expected
        assert psutil.wait_procs(old, timeout=PATIENCE)[1] == []
        assert len(ranks_of(server)) == 2
        assert client.get_status().num_engine_restarts == 1
