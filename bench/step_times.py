"""Times of engine steps by depth and batch size, for simulations of load.

    python -m bench.step_times [--model DIR] [--output FILE]

Measures one engine in a child process, without gRPC: the time of a step that generates one token
for each request of a batch, all of one depth, and the time of a prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path

from server.calibration.hardware import describe_hardware
from server.calibration.versions import measuring_versions
from server.engine.base import GenerationRequest, LayerSelection, SamplingOptions
from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig
from server.model.source import DEMO_MODEL

BATCHES = (1, 4, 16, 64)
PROMPT_TOKENS = 256
NUM_TOKENS = 32
ROUNDS = 3


class Bench:
    def __init__(self, engine: ElasticEngine) -> None:
        self._engine = engine
        self._count = 0

    async def steps(self, num_requests: int, layers: LayerSelection) -> float:
        """Return the median time of a step with this many requests, in seconds."""
        times: list[float] = []

        async def one(*, watched: bool) -> None:
            latest = 0.0
            async for _ in self._engine.generate(self._request(16, NUM_TOKENS, layers)):
                now = time.perf_counter()
                if watched and latest:
                    times.append(now - latest)
                latest = now

        await asyncio.gather(*[one(watched=i == 0) for i in range(num_requests)])
        return statistics.median(times)

    async def prompt(self, layers: LayerSelection) -> float:
        """Return the time to the first token of a prompt of ``PROMPT_TOKENS``, in seconds."""
        started = time.perf_counter()
        async for _ in self._engine.generate(self._request(PROMPT_TOKENS, 1, layers)):
            pass
        return time.perf_counter() - started

    def _request(
        self, num_prompt: int, num_tokens: int, layers: LayerSelection
    ) -> GenerationRequest:
        self._count += 1
        return GenerationRequest(
            f"step-{self._count}",
            [7 + (self._count * 31 + position * 17) % 400 for position in range(num_prompt)],
            layers,
            SamplingOptions(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
        )


async def measure(model: Path) -> dict[str, object]:
    engine = ElasticEngine(ElasticConfig(model=model, name=model.name, kv_cache_gib=0.5))
    await engine.start()
    try:
        bench = Bench(engine)
        num_layers = engine.model.num_layers
        depths = [max(1, num_layers * quarter // 4) for quarter in (4, 3, 2, 1)]
        cut = {d: tuple(range(num_layers - d)) for d in depths}
        selections = {d: LayerSelection(skipped, skipped) for d, skipped in cut.items()}
        await bench.steps(max(BATCHES), selections[num_layers])
        steps = {
            d: {n: min([await bench.steps(n, layers) for _ in range(ROUNDS)]) for n in BATCHES}
            for d, layers in selections.items()
        }
        prompts = {
            d: min([await bench.prompt(layers) for _ in range(ROUNDS)])
            for d, layers in selections.items()
        }
    finally:
        await engine.shutdown()
    return {
        "model": model.name,
        "hardware": describe_hardware(),
        "versions": measuring_versions(),
        "command": "python -m bench.step_times",
        "prompt_tokens": PROMPT_TOKENS,
        # Seconds for a prompt of ``prompt_tokens``, by depth.
        "prompt_seconds": prompts,
        # Seconds of a step, by depth and then by the number of its requests.
        "step_seconds": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(asyncio.run(measure(arguments.model)), indent=2)
    if arguments.output is not None:
        arguments.output.write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
