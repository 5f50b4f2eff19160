"""Tokens/s of a server at several depths, next to plain vLLM serving the dense model.

    python -m bench.depth_throughput [--model DIR] [--streams 1 32] [--output FILE]

A `fathom serve` process is measured over real gRPC; unmodified vLLM runs in this process, by its
``AsyncLLM``, as it comes and with ``enforce_eager``. They take turns within each round, so that
a change of the machine's pace hits all of them; ratios are medians over the rounds. Memory of the
server is measured after one depth has been used and after all of them have, in one batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from server.engine.arguments import (
    IN_PROCESS_EXECUTOR,
    cpu_dtype,
    prepare_cpu_environment,
    prepare_environment,
)
from server.hardware import describe_hardware
from server.model_source import DEMO_MODEL
from server.rpc.client import AsyncClient, CallError, Client
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2
from server.version import measuring_versions

PROMPT_TOKENS = 16

# Generates for one stream: (stream, number of tokens)
Stream = Callable[[int, int], Awaitable[None]]


def prompt(stream: int) -> list[int]:
    """Return a prompt that no other stream has, so that no prefix is cached."""
    return [7 + (stream * 31 + position * 17) % 400 for position in range(PROMPT_TOKENS)]


async def rate(stream: Stream, num_streams: int, num_tokens: int) -> float:
    started = time.perf_counter()
    await asyncio.gather(*[stream(index, num_tokens) for index in range(num_streams)])
    return num_streams * num_tokens / (time.perf_counter() - started)


class PlainVllm:
    """vLLM without Fathom."""

    def __init__(self, model: Path, dtype: str, *, eager: bool) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(model),
                dtype=dtype,
                enforce_eager=eager,
                max_num_seqs=64,
                kv_cache_memory_bytes=1 << 28,
                enable_prefix_caching=False,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                distributed_executor_backend=IN_PROCESS_EXECUTOR,
            )
        )
        self._count = 0

    async def stream(self, index: int, num_tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self._count += 1
        params = SamplingParams(
            temperature=0.0,
            max_tokens=num_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        async for _ in self._llm.generate(tokens_input(prompt(index)), params, str(self._count)):
            pass

    def close(self) -> None:
        self._llm.shutdown()


class FathomServer:
    """A server in a process of its own."""

    def __init__(self, model: Path, dtype: str, directory: Path) -> None:
        self._log = directory / "log"
        command = [
            *(Path(sys.executable).parent / "fathom", "serve", "--model", model),
            *("--port", "50951", "--metrics-port", "50952", "--dtype", dtype),
            *("--state-dir", directory / "state", "--max-num-seqs", "64"),
            *("--kv-cache-gib", "0.25", "--engine-args", '{"enable_prefix_caching": false}'),
        ]
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdout=self._log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        self._address = "127.0.0.1:50951"
        with Client(self._address) as client:
            while not self._serves(client):
                if self._process.poll() is not None:
                    raise SystemExit(self._log.read_text())
                time.sleep(0.2)
            self.model = client.get_model()
            self.startup_seconds = dict(client.get_status().startup_seconds)
        self._client = AsyncClient(self._address)

    @staticmethod
    def _serves(client: Client) -> bool:
        try:
            return client.health() == "SERVING"
        except CallError:
            return False

    def stream(self, depth: int) -> Stream:
        async def stream(index: int, num_tokens: int) -> None:
            request = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(ids=prompt(index)),
                depth=common_pb2.Depth(layers=depth),
                sampling=inference_pb2.SamplingParams(temperature=0.0),
                stop=inference_pb2.StopConditions(max_tokens=num_tokens, ignore_eos=True),
            )
            async for _ in self._client.inference.GenerateStream(request):
                pass

        return stream

    def memory_mib(self) -> float:
        """Return the unique memory of the server's processes."""
        root = psutil.Process(self._process.pid)
        processes = [root, *root.children(recursive=True)]
        return sum(process.memory_full_info().uss for process in processes) / 2**20

    async def close(self) -> None:
        await self._client.close()
        self._process.terminate()
        self._process.wait()


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    dtype = cpu_dtype(arguments.dtype, quantized=False)
    with tempfile.TemporaryDirectory() as directory:
        server = FathomServer(arguments.model, dtype, Path(directory))
        num_layers = server.model.num_layers
        depths = sorted({num_layers, max(1, 3 * num_layers // 4), max(1, num_layers // 2)})[::-1]
        await rate(server.stream(num_layers), 32, arguments.tokens)
        memory = {"one_depth_mib": server.memory_mib()}
        every = [server.stream(1 + index % num_layers) for index in range(32)]
        await asyncio.gather(*[s(index, arguments.tokens) for index, s in enumerate(every)])
        memory["every_depth_mib"] = server.memory_mib()

        plain = {
            "vLLM": PlainVllm(arguments.model, dtype, eager=False),
            "vLLM eager": PlainVllm(arguments.model, dtype, eager=True),
        }
        subjects: dict[str, Stream] = {name: vllm.stream for name, vllm in plain.items()}
        subjects |= {f"depth {depth}": server.stream(depth) for depth in depths}
        rates: dict[int, dict[str, list[float]]] = {}
        for num_streams in arguments.streams:
            of_streams = rates.setdefault(num_streams, {name: [] for name in subjects})
            for stream in subjects.values():  # warm-up
                await rate(stream, num_streams, 8)
            for _ in range(arguments.rounds):
                for name, stream in subjects.items():
                    of_streams[name].append(await rate(stream, num_streams, arguments.tokens))
        for vllm in plain.values():
            vllm.close()
        await server.close()
    return {
        "command": " ".join(sys.argv),
        "machine": {
            **describe_hardware(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "versions": measuring_versions(),
        "model": server.model.name,
        "dtype": dtype,
        "num_layers": num_layers,
        "tokens_per_stream": arguments.tokens,
        "startup_seconds": server.startup_seconds,
        "memory": memory,
        "tokens_per_second": rates,
    }


def show(result: dict[str, Any], console: Console) -> None:
    for num_streams, rates in result["tokens_per_second"].items():
        table = Table(title=f"{num_streams} streams, {result['dtype']}")
        for heading in ("", "Tokens/s", "of vLLM", "of vLLM eager", "of full depth"):
            table.add_column(heading, justify="left" if not heading else "right")
        full = f"depth {result['num_layers']}"
        for name, values in rates.items():
            ratios = [
                f"{statistics.median(a / b for a, b in zip(values, rates[to], strict=True)):.2f}"
                for to in ("vLLM", "vLLM eager", full)
            ]
            table.add_row(name, f"{statistics.median(values):.0f}", *ratios)
        console.print(table)
    memory = result["memory"]
    console.print(
        f"Memory of the server: {memory['one_depth_mib']:.0f} MiB after one depth, "
        f"{memory['every_depth_mib']:.0f} MiB after all {result['num_layers']}"
    )
    phases = ", ".join(f"{name} {s:.1f} s" for name, s in result["startup_seconds"].items())
    console.print(f"Start: {phases}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    prepare_environment()
    prepare_cpu_environment(arguments.model)
    result = asyncio.run(measure(arguments))
    show(result, Console())
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
