"""Goodput under a burst of twice the dense capacity: automatic depth against fixed dense.

    python -m bench.burst [--rounds 3] [--seconds 15] [--factor 2]

A server of the demo model is started, and the requests per second that it finishes at full depth
are measured in a closed loop. Then requests arrive at random (a Poisson process) at ``factor``
times that rate, once all at full depth and once with ``depth.auto``, in turns, with the same
arrivals. A request is good when its first token and the mean time between its tokens were within
the targets; latencies count from when it was due. The load generator shares the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
from collections.abc import AsyncIterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.demo_server import DemoServer, demo_server
from bench.lengths import Lengths
from bench.load import Generate, Load, Timeline, closed_loop, open_loop
from bench.statistics import Percentiles
from bench.workload import Request, Workload, poisson_arrivals
from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2

PROMPT_TOKENS = 16
OUTPUT_TOKENS = 48
NUM_STREAMS = 32
FIRST_TOKEN_SECONDS = 1.0
INTER_TOKEN_SECONDS = 0.05
HOLD_SECONDS = 2.0

DENSE = common_pb2.Depth(level="dense")
AUTO = common_pb2.Depth(auto=common_pb2.Auto())


@dataclass(frozen=True, slots=True)
class Burst:
    """Results of one burst; ``depths`` are the numbers of layers that requests were served at."""

    good: int
    total: int
    seconds: float
    first_tokens: Percentiles | None
    tokens_per_second: float
    depths: tuple[int, ...]

    @property
    def goodput(self) -> float:
        return self.good / self.seconds


class Bench:
    def __init__(self, client: AsyncClient, seconds: float) -> None:
        self._client = client
        self._seconds = seconds
        self._workload = Workload(
            Lengths.parse(str(PROMPT_TOKENS)), Lengths.parse(str(OUTPUT_TOKENS)), vocab_size=500
        )

    async def capacity(self) -> float:
        """Return how many requests per second are finished at full depth."""
        streams = self._workload.streams(NUM_STREAMS, 6)
        load = await closed_loop(self._generate(DENSE, []), streams)
        return len(load.timelines) / load.seconds

    async def burst(self, depth: common_pb2.Depth, rate: float, seed: int) -> Burst:
        count = int(rate * self._seconds)
        depths: list[int] = []
        load = await open_loop(
            self._generate(depth, depths),
            self._workload.requests(count),
            poisson_arrivals(rate, count, seed),
        )
        good = sum(map(_is_good, load.timelines))
        return Burst(
            good,
            count,
            self._seconds,
            load.time_to_first_token(),
            _rate_of(load),
            tuple(depths),
        )

    async def calm(self) -> None:
        """Return once the depth is that without load."""
        while True:
            status = await self._client.control.GetStatus(control_pb2.GetStatusRequest())
            if (status.auto_level, status.num_running, status.num_waiting) == ("dense", 0, 0):
                return
            await asyncio.sleep(0.5)

    def _generate(self, depth: common_pb2.Depth, depths: list[int]) -> Generate:
        async def generate(request: Request) -> AsyncIterator[int]:
            message = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=request.prompt_ids),
                depth=depth,
                sampling=inference_pb2.SamplingParams(temperature=0.0),
                stop=inference_pb2.StopConditions(max_tokens=request.num_tokens, ignore_eos=True),
                output=inference_pb2.OutputOptions(token_ids=True),
            )
            async for response in self._client.inference.GenerateStream(message):
                match response.WhichOneof("event"):
                    case "prompt_info":
                        depths.append(response.prompt_info.served.decode_layers)
                    case "delta":
                        yield len(response.delta.token_ids)

        return generate


def _rate_of(load: Load) -> float:
    return load.num_tokens / load.seconds


def _is_good(timeline: Timeline) -> bool:
    # A server that is behind sends all tokens in one message, with no time between them.
    latencies = timeline.inter_token_latencies() or [0.0]
    return (
        timeline.time_to_first_token <= FIRST_TOKEN_SECONDS
        and statistics.fmean(latencies) <= INTER_TOKEN_SECONDS
    )


async def measure(arguments: argparse.Namespace, server: DemoServer) -> None:
    async with AsyncClient(server.address) as client:
        bench = Bench(client, arguments.seconds)
        await bench.capacity()  # the first run only warms up
        capacity = max([await bench.capacity() for _ in range(2)])
        rate = arguments.factor * capacity
        results: dict[str, list[Burst]] = {"dense": [], "auto": []}
        for number in range(arguments.rounds):
            for name, depth in (("dense", DENSE), ("auto", AUTO)):
                await bench.calm()
                burst = await bench.burst(depth, rate, seed=number)
                results[name].append(burst)
                print(f"round {number + 1}, {name}: {burst.good} of {burst.total} good", flush=True)
    _show(capacity, rate, results)


def _show(capacity: float, rate: float, results: dict[str, list[Burst]]) -> None:
    table = Table(
        title=f"Capacity at full depth {capacity:.1f} requests/s; bursts of {rate:.1f} requests/s"
    )
    for column in ("", "good/s", "good", "first token p50", "p99", "tokens/s", "mean depth"):
        table.add_column(column, justify="right" if column else "left")
    for name, bursts in results.items():
        for number, burst in enumerate(bursts):
            latency = burst.first_tokens
            assert latency is not None
            table.add_row(
                f"{name}, round {number + 1}",
                f"{burst.goodput:.1f}",
                f"{burst.good / burst.total:.1%}",
                f"{latency.p50:.2f} s",
                f"{latency.p99:.2f} s",
                f"{burst.tokens_per_second:.0f}",
                f"{statistics.fmean(burst.depths):.1f}",
            )
    console = Console()
    console.print(table)
    dense, auto = (statistics.median(b.goodput for b in bursts) for bursts in results.values())
    console.print(
        f"Good is {FIRST_TOKEN_SECONDS:g} s to the first token and {INTER_TOKEN_SECONDS:g} s "
        f"between tokens. Median goodput: dense {dense:.1f}/s, auto {auto:.1f}/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.burst", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each burst")
    parser.add_argument("--factor", type=float, default=2.0, help="of the capacity at full depth")
    parser.add_argument(
        "--max-quality-loss", type=float, default=5.0, help="perplexity ratio to dense, less 1"
    )
    arguments = parser.parse_args()

    async def run() -> None:
        async with demo_server(
            max_num_seqs=NUM_STREAMS,
            kv_cache_gib=0.5,
            auto_first_token_seconds=FIRST_TOKEN_SECONDS / 2,
            auto_inter_token_seconds=INTER_TOKEN_SECONDS,
            auto_hold_seconds=HOLD_SECONDS,
            auto_max_quality_loss=arguments.max_quality_loss,
            auto_max_writing_loss=math.inf,
            auto_max_repetition=1.0,
            engine_args='{"enable_prefix_caching": false}',
        ) as server:
            await measure(arguments, server)

    asyncio.run(run())


if __name__ == "__main__":
    main()
