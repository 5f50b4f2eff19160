"""Clients that go away, and deadlines that pass: the engine is free at once."""

from __future__ import annotations

from collections.abc import Iterator

from server.rpc.client import Client
from server.rpc.generated.fathom.v1 import inference_pb2
from tests.e2e.calls import LONG, assert_generates, at_once, failure, greedy_request
from tests.e2e.running_server import RunningServer, Scrape, until

NUM_STREAMS = 16
STREAM = "fathom.v1.Inference/GenerateStream"


def running(server: RunningServer) -> tuple[float, float, int]:
    """Return how many requests Fathom, vLLM and the status say are running."""
    scrape = server.scrape()
    with server.client() as client:
        status = client.get_status()
    return (
        scrape.value("fathom_requests_running"),
        scrape.value("vllm:num_requests_running"),
        status.num_running + status.num_waiting,
    )


def wait_until_idle(server: RunningServer) -> None:
    until(lambda: running(server) == (0, 0, 0), lambda: f"still running: {running(server)}")


def wait_for_calls(server: RunningServer, before: Scrape, code: str, count: int) -> Scrape:
    """Return the first scrape with ``count`` more streams that ended with ``code``."""

    def counted() -> Scrape | None:
        scrape = server.scrape()
        return scrape if num_calls(scrape, code) - num_calls(before, code) >= count else None

    return until(counted, lambda: f"no {count} streams with {code}")


def num_calls(scrape: Scrape, code: str) -> float:
    return scrape.sum("fathom_requests_total", method=STREAM, code=code)


def generated(scrape: Scrape) -> float:
    return scrape.sum("fathom_generation_tokens_total")


def test_cancelled_streams_free_the_engine(demo_server: RunningServer, demo_client: Client) -> None:
    wait_until_idle(demo_server)
    before = demo_server.scrape()

    def begin(depth: int) -> Iterator[inference_pb2.GenerateStreamResponse]:
        stream = demo_client.generate_stream(greedy_request("The list", LONG, depth=depth))
        assert next(stream).WhichOneof("event") == "prompt_info"
        assert next(stream).WhichOneof("event") == "delta"
        return stream

    streams = at_once(begin, range(1, NUM_STREAMS + 1))
    until(
        lambda: running(demo_server)[:2] == (NUM_STREAMS, NUM_STREAMS),
        lambda: f"running: {running(demo_server)}",
    )
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]  # a generator
    wait_until_idle(demo_server)
    after = wait_for_calls(demo_server, before, "CANCELLED", NUM_STREAMS)
    for depth in range(1, NUM_STREAMS + 1):
        labels = {"method": STREAM, "code": "CANCELLED", "depth": str(depth)}
        counts = [scrape.sum("fathom_requests_total", **labels) for scrape in (before, after)]
        assert counts[1] - counts[0] == 1
    assert num_calls(after, "OK") == num_calls(before, "OK")
    assert 0 < generated(after) - generated(before) < NUM_STREAMS * LONG
    assert_generates(demo_client)


def test_deadlines_that_pass_free_the_engine(
    demo_server: RunningServer, demo_client: Client
) -> None:
    wait_until_idle(demo_server)
    before = demo_server.scrape()
    # No machine generates as much in that time.
    with demo_server.client(timeout=2.0) as hurried:
        requests = [greedy_request("The list", LONG) for _ in range(NUM_STREAMS)]
        errors = at_once(
            lambda request: failure(lambda: list(hurried.generate_stream(request))), requests
        )
    assert {error.code for error in errors} == {"DEADLINE_EXCEEDED"}
    wait_until_idle(demo_server)
    after = wait_for_calls(demo_server, before, "DEADLINE_EXCEEDED", NUM_STREAMS)
    assert num_calls(after, "OK") == num_calls(before, "OK")
    assert num_calls(after, "CANCELLED") == num_calls(before, "CANCELLED")
    assert generated(after) - generated(before) < NUM_STREAMS * LONG
    assert_generates(demo_client)


def test_a_unary_call_whose_deadline_passes(
    demo_server: RunningServer, demo_client: Client
) -> None:
    wait_until_idle(demo_server)
    with demo_server.client(timeout=0.5) as hurried:
        requests = [greedy_request("The list", LONG) for _ in range(NUM_STREAMS)]
        errors = at_once(lambda request: failure(lambda: hurried.generate(request)), requests)
    assert {error.code for error in errors} == {"DEADLINE_EXCEEDED"}
    wait_until_idle(demo_server)
    assert_generates(demo_client)
