"""Measure how long one client's stream stands still for another client's large request.

A bystander reads one stream after another from a server, and the longest time between two of its
messages is taken while requests are sent that are as large as a client can make them: too long
for the context, so that they should be refused at once, or as long as it allows. The last ones
are run by the engine, whose steps they are part of; there is no target for them.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from bench.memory import unique_mib
from bench.models import prepare_model
from bench.options import Options, option
from bench.plots import save_bars
from bench.report import Target
from bench.session import Session
from bench.statistics import Spread
from bench.subjects.base import free_port
from bench.subjects.fathom_server import is_serving
from bench.subjects.server_process import ServerProcess
from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import inference_pb2 as pb

MAX_GAP_STEPS = 5.0
_MIB = 2**20
# The bystander is watched for so long before and after a request.
_QUIET_SECONDS = 0.5
_CALL_SECONDS = 120.0


@dataclass(frozen=True)
class BystanderOptions(Options):
    model: str = option("demo", "random, demo, or a checkpoint directory.")
    size: float = option(15.0, "Size of the large requests, in MiB.")


@dataclass(frozen=True, slots=True)
class LargeRequest:
    """Requests of one kind, ``count`` of them at once."""

    name: str
    method: str
    make: Callable[[], bytes]
    count: int = 1
    # Whether the engine runs it.
    runs: bool = False


def run(options: BystanderOptions) -> None:
    asyncio.run(measure(options))


async def measure(options: BystanderOptions) -> Session:
    model = prepare_model(options)
    session = Session("bystander", options, model.describe("the server's choice"))
    requests = large_requests(int(options.size * _MIB), options.max_context)
    with session.progress as progress:
        async with _server(options, model.directory) as (address, server):
            bystander = Bystander(address)
            step = await bystander.median_step()
            for number in range(options.rounds):
                for position, request in enumerate(requests):
                    code, gap = await bystander.watch(request)
                    session.add_round(
                        {
                            "request": request.name,
                            "round": number,
                            "code": code,
                            "gap": gap,
                            "step": step,
                            "server_mib": unique_mib(server.processes()),
                        }
                    )
                    done = number * len(requests) + position + 1
                    progress.advance("Disturbing", done, options.rounds * len(requests))
            await bystander.close()
    for request in requests:
        rounds = [each for each in session.report.rounds if each["request"] == request.name]
        steps = [each["gap"] / each["step"] for each in rounds]
        session.report.summary.append(
            {
                "request": request.name,
                "code": rounds[-1]["code"],
                "longest_gap_ms": 1000 * statistics.median(each["gap"] for each in rounds),
                "steps": statistics.median(steps),
                "server_mib": statistics.median(each["server_mib"] for each in rounds),
            }
        )
        if request.method and not request.runs:
            session.report.targets.append(
                Target.of(request.name, Spread.of(steps), "<=", MAX_GAP_STEPS, "steps")
            )
    session.finish(lambda stem: _plot(session, stem))
    return session


def large_requests(size: int, max_context: int) -> list[LargeRequest]:
    """Return requests of ``size`` bytes, and requests as long as a context of ``max_context``."""

    def ids(length: int) -> pb.TokenIds:
        return pb.TokenIds(ids=[1] * length)

    def text(length: int) -> str:
        return ("The list of words, " * (length // 19 + 1))[:length]

    held = max_context - 8
    stop = pb.StopConditions(max_tokens=1)
    return [
        LargeRequest("nothing", "", lambda: b"", count=0),
        LargeRequest(
            "ids to generate from",
            "Generate",
            lambda: pb.GenerateRequest(token_ids=ids(size)).SerializeToString(),
        ),
        LargeRequest(
            "three of them",
            "Generate",
            lambda: pb.GenerateRequest(token_ids=ids(size)).SerializeToString(),
            count=3,
        ),
        LargeRequest(
            "a text to generate from",
            "Generate",
            lambda: pb.GenerateRequest(prompt=text(size)).SerializeToString(),
        ),
        LargeRequest(
            "a text to tokenize",
            "Tokenize",
            lambda: pb.TokenizeRequest(text=text(size)).SerializeToString(),
        ),
        LargeRequest(
            "a text to score",
            "Score",
            lambda: pb.ScoreRequest(text=text(size)).SerializeToString(),
        ),
        LargeRequest(
            "a chat of empty messages",
            "Generate",
            lambda: pb.GenerateRequest(
                chat=pb.Chat(messages=[pb.ChatMessage()] * (size // 2))
            ).SerializeToString(),
        ),
        LargeRequest(
            "ids of 3 MiB",
            "Generate",
            lambda: pb.GenerateRequest(token_ids=ids(3 * _MIB)).SerializeToString(),
        ),
        LargeRequest(
            "a text of 3 MiB to tokenize",
            "Tokenize",
            lambda: pb.TokenizeRequest(text=text(3 * _MIB)).SerializeToString(),
        ),
        LargeRequest(
            "a context's characters to tokenize",
            "Tokenize",
            lambda: pb.TokenizeRequest(text=text(4 * max_context)).SerializeToString(),
        ),
        LargeRequest(
            "a context to generate from",
            "Generate",
            lambda: pb.GenerateRequest(token_ids=ids(held), stop=stop).SerializeToString(),
            runs=True,
        ),
        LargeRequest(
            "a context to score",
            "Score",
            lambda: pb.ScoreRequest(token_ids=ids(held)).SerializeToString(),
            runs=True,
        ),
    ]


class Bystander:
    """A client with a stream at any time, which is told of no other."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = AsyncClient(address)
        self._times: list[float] = []

    async def close(self) -> None:
        await self._client.close()

    async def median_step(self) -> float:
        """Return the time between two messages while nothing else is asked for, in seconds."""
        async with self._reading():
            await asyncio.sleep(4 * _QUIET_SECONDS)
        return statistics.median(self._gaps())

    async def watch(self, request: LargeRequest) -> tuple[str, float]:
        """Send a request; return its code, and the longest time between two messages meanwhile."""
        data = await asyncio.to_thread(request.make)
        async with self._reading():
            await asyncio.sleep(_QUIET_SECONDS)
            del self._times[:-1]
            calls = [
                asyncio.to_thread(_send, self._address, request.method, data)
                for _ in range(request.count)
            ]
            codes = await asyncio.gather(*calls)
            await asyncio.sleep(_QUIET_SECONDS)
        return codes[0] if codes else "", max(self._gaps())

    def _gaps(self) -> Sequence[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self._times)]

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[None]:
        self._times.clear()
        reading = asyncio.create_task(self._read())
        try:
            while not self._times and not reading.done():
                await asyncio.sleep(0.01)
            yield
        finally:
            reading.cancel()
            (result,) = await asyncio.gather(reading, return_exceptions=True)
        if isinstance(result, Exception):
            raise result

    async def _read(self) -> None:
        request = pb.GenerateRequest(
            prompt="The list",
            sampling=pb.SamplingParams(temperature=0.0),
            stop=pb.StopConditions(max_tokens=256, ignore_eos=True),
        )
        while True:
            async for _ in self._client.inference.GenerateStream(request):
                self._times.append(time.monotonic())


def _send(address: str, method: str, data: bytes) -> str:
    """Send a message as it is, and return the code of the answer, which is not decoded."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        call: Any = channel.unary_unary(f"/fathom.v1.Inference/{method}")
        try:
            call(data, timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            code: Any = error
            return str(code.code().name)
    return "OK"


@asynccontextmanager
async def _server(
    options: BystanderOptions, directory: Path
) -> AsyncIterator[tuple[str, ServerProcess]]:
    port = free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="fathom-") as state:
        command: list[object] = [
            *(Path(sys.executable).parent / "fathom", "serve", "--port", port),
            *("--metrics-port", free_port(), "--state-dir", state),
            # What a start leaves would be measured in the gaps of the load that is timed.
            *("--max-context", options.max_context, "--startup-seconds", "inf"),
        ]
        if options.model != "demo":
            command += ["--model", directory, "--dtype", options.dtype]
        server = ServerProcess(command, options.work_directory / "logs" / f"bystander-{port}.log")

        try:
            await server.wait_until(lambda: is_serving(address))
            yield address, server
        finally:
            server.close()


def _plot(session: Session, stem: Path) -> None:
    bars = {
        row["request"]: {"longest gap": row["longest_gap_ms"]} for row in session.report.summary
    }
    save_bars(stem, bars, x_label="milliseconds", title=session.title)
