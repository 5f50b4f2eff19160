"""The cost for other clients of a client that never reads, which should be nothing.

    python -m bench.slow_reader [--rounds 5]

A server of the demo model is started. 16 clients send one request after another, in turns: without
another client (``alone``), beside one more that reads its stream (``reading``), and beside one that
does not (``not reading``). The additional client asks for 20 log-probabilities with each token, far
more data than its connection holds, and for more tokens than the others need steps, so it runs the
whole time. It takes a slot in every batch whether it reads or not, so the cost of not reading is
the ratio of the last two.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from bench.demo_server import DemoServer, demo_server
from bench.lengths import Lengths
from bench.load import closed_loop
from bench.memory import unique_mib
from bench.statistics import paired_ratio
from bench.subjects.fathom_server import FathomServer
from bench.workload import Workload
from server.cli.connection import Connection
from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2, inference_pb2_grpc

NUM_STREAMS = 16
NUM_REQUESTS = 3
OUTPUT_TOKENS = 128
# More tokens than a round has steps, and no more than the context holds.
LONG = 480
# These make a connection take only few bytes before they are read.
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]

Beside = Callable[[DemoServer], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def nobody(server: DemoServer) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def one_that_reads(server: DemoServer) -> AsyncIterator[None]:
    async with _stream(server, []) as stream:
        reading = asyncio.create_task(_read(stream))
        try:
            yield
            assert not reading.done(), "the stream has ended before the others"
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@asynccontextmanager
async def one_that_does_not(server: DemoServer) -> AsyncIterator[None]:
    async with _stream(server, NARROW):
        yield


BESIDE: dict[str, Beside] = {
    "alone": nobody,
    "reading": one_that_reads,
    "not reading": one_that_does_not,
}


@asynccontextmanager
async def _stream(server: DemoServer, options: list[tuple[str, int]]) -> AsyncIterator[Any]:
    request = inference_pb2.GenerateRequest(
        prompt="The list",
        sampling=inference_pb2.SamplingParams(temperature=0.0),
        stop=inference_pb2.StopConditions(max_tokens=LONG, ignore_eos=True),
        output=inference_pb2.OutputOptions(token_ids=True, logprobs=20),
    )
    async with grpc.aio.insecure_channel(server.address, options=options) as channel:
        stream = inference_pb2_grpc.InferenceStub(channel).GenerateStream(request)
        assert (await stream.read()).HasField("prompt_info")
        try:
            yield stream
        finally:
            stream.cancel()


async def _read(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


async def measure(server: DemoServer, rounds: int) -> None:
    workload = Workload(Lengths.parse("16"), Lengths.parse(str(OUTPUT_TOKENS)), vocab_size=500)
    streams = workload.streams(NUM_STREAMS, NUM_REQUESTS)
    speeds: dict[str, list[float]] = {name: [] for name in BESIDE}
    memory: dict[str, list[float]] = {name: [] for name in BESIDE}
    subject = FathomServer(None, Connection(server.address))
    await subject.start()
    async with AsyncClient(server.address) as client:
        for number in range(rounds + 1):  # the first round warms up
            for name, beside in BESIDE.items():
                async with beside(server):
                    load = await closed_loop(subject.generate, streams)
                    used = unique_mib(server.process.processes())
                await _calm(client)
                if number:
                    speeds[name].append(load.tokens_per_second)
                    memory[name].append(used)
    await subject.close()
    _show(speeds, memory)


async def _calm(client: AsyncClient) -> None:
    """Return when nothing runs."""
    while True:
        status = await client.control.GetStatus(control_pb2.GetStatusRequest())
        if (status.num_running, status.num_waiting) == (0, 0):
            return
        await asyncio.sleep(0.1)


def _show(speeds: dict[str, list[float]], memory: dict[str, list[float]]) -> None:
    table = Table(title=f"{NUM_STREAMS} clients, beside one more")
    for column in ("", "tokens/s", "of alone", "of reading", "MiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in speeds.items():
        ratios = [paired_ratio(values, speeds[other]) for other in ("alone", "reading")]
        table.add_row(
            name,
            f"{statistics.median(values):.0f}",
            *map(str, ratios),
            f"{statistics.median(memory[name]):.0f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.slow_reader", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    async def run() -> None:
        async with demo_server(max_num_seqs=2 * NUM_STREAMS, kv_cache_gib=0.5) as server:
            await measure(server, arguments.rounds)

    asyncio.run(run())


if __name__ == "__main__":
    main()
