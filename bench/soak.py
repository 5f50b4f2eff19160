"""A long mixed load, after which memory, descriptors, threads and tasks must not have grown.

    python -m bench.soak [--minutes 3] [--workers 24]

A server of the demo model gets streams, unary calls, scores, wrong requests, cancellations, too
short deadlines and clients that hardly read, at all depths. After a warm-up and at the end, the
load pauses and the resources of the server's processes are counted. The exit status is 1 if they
have grown by more than ``--max-growth``, or if a call ended with INTERNAL or UNKNOWN.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, fields

import grpc
from rich.console import Console
from rich.table import Table

from bench.demo_server import DemoServer, demo_server
from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2

WARM_UP_SECONDS = 45.0
PAUSE_SECONDS = 4.0
# Growth that has other reasons than a leak.
SLACK = {"memory_mib": 16.0, "descriptors": 8.0, "threads": 8.0, "tasks": 4.0}
PROMPTS = ("Return the", "The list", "An object is", "See also " * 20)


@dataclass(frozen=True, slots=True)
class Holding:
    """The resources of all processes of the server; ``tasks`` are those of asyncio."""

    memory_mib: float
    descriptors: float
    threads: float
    tasks: float


def holding(server: DemoServer) -> Holding:
    processes = server.process.processes()
    with urllib.request.urlopen(server.metrics_url, timeout=60) as response:
        lines = response.read().decode().splitlines()
    (tasks,) = (float(line.split()[1]) for line in lines if line.startswith("fathom_tasks "))
    return Holding(
        memory_mib=sum(p.memory_full_info().uss for p in processes) / 2**20,
        descriptors=sum(p.num_fds() for p in processes),
        threads=sum(p.num_threads() for p in processes),
        tasks=tasks,
    )


class Load:
    """Workers that send one request after another, of a kind chosen at random each time."""

    def __init__(self, address: str, num_workers: int, seed: int) -> None:
        self._address = address
        self._num_workers = num_workers
        self._rng = random.Random(seed)
        self.codes: Counter[str] = Counter()

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        async with AsyncClient(self._address) as client:

            async def work() -> None:
                while time.monotonic() < end:
                    try:
                        self.codes[await self._one(client)] += 1
                    except grpc.aio.AioRpcError as error:
                        self.codes[error.code().name] += 1
                    except asyncio.CancelledError:
                        if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                            raise
                        self.codes["CANCELLED"] += 1

            await asyncio.gather(*[work() for _ in range(self._num_workers)])

    async def _one(self, client: AsyncClient) -> str:
        """Return the status code of a call."""
        rng, inference = self._rng, client.inference
        request = inference_pb2.GenerateRequest(
            prompt=rng.choice(PROMPTS),
            depth=common_pb2.Depth(layers=rng.randrange(1, 17)),
            stop=inference_pb2.StopConditions(max_tokens=rng.randrange(1, 100), ignore_eos=True),
        )
        match rng.randrange(8):
            case 0 | 1:
                async for _ in inference.GenerateStream(request):
                    pass
            case 2:
                await inference.Generate(request)
            case 3:
                await inference.Score(inference_pb2.ScoreRequest(text=rng.choice(PROMPTS)))
            case 4:
                request.depth.layers = 17 + rng.randrange(100)
                await inference.Generate(request)
            case 5:
                call = inference.GenerateStream(request)
                await call.read()
                await asyncio.sleep(rng.random() / 10)
                call.cancel()
                return str((await call.code()).name)
            case 6:
                await inference.Generate(request, timeout=rng.random() / 10)
            case 7:
                request.output.logprobs = 20
                call = inference.GenerateStream(request)
                await call.read()
                await asyncio.sleep(rng.random() * 2)
                while await call.read() is not grpc.aio.EOF:
                    pass
        return "OK"


async def soak(arguments: argparse.Namespace) -> bool:
    """Return whether nothing has grown and no call has failed."""
    console = Console()
    console.print("Starting a server")
    async with demo_server(max_num_seqs=32, kv_cache_gib=0.5) as server:
        load = Load(server.address, arguments.workers, arguments.seed)
        console.print(f"Warming it up for {WARM_UP_SECONDS:g} s")
        await load.run(WARM_UP_SECONDS)
        await asyncio.sleep(PAUSE_SECONDS)
        start = holding(server)
        load.codes.clear()
        console.print(f"Putting load on it for {arguments.minutes:g} min")
        await load.run(60 * arguments.minutes)
        await asyncio.sleep(PAUSE_SECONDS)
        end = holding(server)
    grown = [
        field.name
        for field in fields(Holding)
        if getattr(end, field.name)
        > getattr(start, field.name) * (1 + arguments.max_growth) + SLACK[field.name]
    ]
    table = Table(title=f"{load.codes.total()} calls in {arguments.minutes:g} min")
    for column in ("", "start", "end"):
        table.add_column(column, justify="right" if column else "left")
    for field in fields(Holding):
        values = (getattr(holding, field.name) for holding in (start, end))
        table.add_row(field.name.replace("_mib", ", MiB"), *(f"{value:.0f}" for value in values))
    console.print(table)
    console.print(", ".join(f"{code} {count}" for code, count in load.codes.most_common()))
    failed = load.codes["INTERNAL"] + load.codes["UNKNOWN"]
    console.print(f"Grown: {', '.join(grown) or 'nothing'}")
    if failed:
        console.print(f"{failed} calls failed by the server's own fault")
    return not grown and not failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--workers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-growth", type=float, default=0.02, help="as a share")
    sys.exit(0 if asyncio.run(soak(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
