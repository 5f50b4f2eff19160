"""One model over two processes: the same tokens and measurements as in one."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pruning.decoder import StandIn
from pruning.importance import measure_block_influence
from pruning.metrics import dense_pass
from pruning.repair import fit_repair, load_maps, save_gated_mlps
from server.engine.base import EngineDead, GenerationRequest, LayerSelection, SamplingOptions
from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig
from server.engine.ranks import Ranks
from server.errors import InvalidArgument
from tests.conftest import data_path
from tests.gated_mlps import random_mlps
from tests.server.engine.elastic import reference
from tests.server.engine.elastic.running_engine import NAMESPACE, RunningEngine, running_engine

NUM_TOKENS = 24
ORDER = (2, 3, 1, 4, 0)
NUM_LAYERS = len(ORDER)

pytestmark = pytest.mark.skipif(
    (torch.cuda.is_available() and torch.cuda.device_count() < 2)
    or (not torch.cuda.is_available() and len(os.sched_getaffinity(0)) < 2),
    reason="two ranks need two GPUs, or two cores",
)


def selection(prefill_depth: int, decode_depth: int, repair: str | None = None) -> LayerSelection:
    prefill, decode = (
        tuple(sorted(ORDER[: NUM_LAYERS - depth])) for depth in (prefill_depth, decode_depth)
    )
    return LayerSelection(prefill, decode, repair)


@pytest.fixture(scope="module")
def engine(stories_model: Path) -> Iterator[RunningEngine]:
    with running_engine(
        stories_model, ranks=Ranks(tensor_parallel_size=2), compile_layers=True
    ) as running:
        yield running


@pytest.fixture(scope="module")
def dense(stories_model: Path) -> Any:
    return reference.load(stories_model)


@pytest.fixture(scope="module")
def windows(engine: RunningEngine) -> list[list[int]]:
    stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
    return [engine.engine.tokenize(story)[:128] for story in stories[:24]]


def test_there_is_a_process_for_each_rank(engine: RunningEngine) -> None:
    assert len(ranks_of(engine)) == 2


def test_pairs_of_depths_with_and_without_repair_in_one_batch(
    engine: RunningEngine, dense: Any, windows: list[list[int]], tmp_path: Path
) -> None:
    """The maps are fitted by the two ranks together, and both apply them; MLPs, too."""
    path = tmp_path / "maps.safetensors"
    engine.run(
        engine.engine.fit_repair(
            windows,
            path,
            model_fingerprint="sha256:aa",
            text_fingerprint="sha256:bb",
            progress=lambda *_: None,
        )
    )
    maps = load_maps(path)
    expected = fit_repair(
        dense,
        [torch.tensor(window) for window in windows],
        model_fingerprint="sha256:aa",
        text_fingerprint="sha256:bb",
    )
    assert maps.num_tokens == expected.num_tokens
    for layer, layer_map in expected.layers.items():
        difference = (maps.layers[layer].weight - layer_map.weight).norm()
        assert difference < 0.01 * layer_map.weight.norm(), layer

    repair = engine.run(engine.engine.install_repair(path))
    mlps = random_mlps((1, 2, 4), num_layers=5, hidden_size=dense.config.hidden_size)
    save_gated_mlps(mlps, tmp_path / "mlps.safetensors")
    gated = engine.run(engine.engine.install_repair(tmp_path / "mlps.safetensors"))
    stand_ins: dict[str | None, Mapping[int, StandIn]] = {
        None: {},
        repair: maps.layers,
        gated: mlps.layers,
    }
    depths = itertools.product((1, 3, 5), repeat=2)
    cases = [selection(a, b, how) for a, b in depths for how in (None, repair)]
    skips = mlps.healing.skipped
    cases += [LayerSelection(*pair, gated) for pair in ((skips, skips), (skips, ()), ((), skips))]
    prompts = [window[: 5 + 9 * number] for number, window in enumerate(windows[:6])]
    prompts = list(itertools.islice(itertools.cycle(prompts), len(cases)))
    assert engine.generate(prompts, cases, NUM_TOKENS) == [
        reference.generate_with_skips(dense, prompt, NUM_TOKENS, layers, stand_ins[layers.repair])
        for prompt, layers in zip(prompts, cases, strict=True)
    ]


def test_measurements_count_every_token_once(
    engine: RunningEngine, dense: Any, windows: list[list[int]]
) -> None:
    sums = engine.run(engine.engine.measure_importance(windows, lambda *_: None))
    all_measured = dense_pass(sums)
    measured = all_measured.block_influence
    expected = measure_block_influence(dense, [torch.tensor([window]) for window in windows])
    assert measured.num_tokens == expected.num_tokens
    assert measured.scores == pytest.approx(expected.scores, abs=1e-5)
    assert measured.stderrs == pytest.approx(expected.stderrs, rel=1e-3)
    reference.check_dense_pass(all_measured, dense, windows)
    (quality,) = engine.run(
        engine.engine.measure_quality(windows, [selection(5, 5)], lambda *_: None)
    )
    assert quality.num_tokens == sum(len(window) - len(window) // 2 for window in windows)
    assert quality.agreement == 1.0


def test_a_killed_rank_ends_its_requests_and_the_engine_starts_again(
    engine: RunningEngine, dense: Any, windows: list[list[int]]
) -> None:
    prompt, layers = windows[0][:20], selection(3, 3)
    options = SamplingOptions(temperature=0.0, max_tokens=400, ignore_eos=True)
    old = ranks_of(engine)

    async def stream(number: int, started: asyncio.Event) -> None:
        request = GenerationRequest(f"killed-{number}", prompt, layers, options, NAMESPACE)
        async for _ in engine.engine.generate(request):
            started.set()

    async def killed() -> list[BaseException | None]:
        events = [asyncio.Event() for _ in range(8)]
        streams = [asyncio.create_task(stream(*each)) for each in enumerate(events)]
        await asyncio.gather(*[event.wait() for event in events])
        os.kill(old[1].pid, signal.SIGKILL)
        return list(await asyncio.gather(*streams, return_exceptions=True))

    outcomes = engine.run(killed())
    assert [type(outcome) for outcome in outcomes] == [EngineDead] * 8
    assert not engine.engine.is_alive
    engine.run(engine.engine.start())
    assert not psutil.wait_procs(old, timeout=60)[1], "no rank of the dead engine is left"
    assert engine.generate([prompt], [layers], NUM_TOKENS) == [
        reference.generate_with_skips(dense, prompt, NUM_TOKENS, layers)
    ]


def ranks_of(engine: RunningEngine) -> list[psutil.Process]:
    """Return the processes that hold a part of the model."""
    (core,) = engine.engine.process_ids
    return [
        process
        for process in psutil.Process(core).children(recursive=True)
        if "resource_tracker" not in " ".join(process.cmdline())
    ]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "^tensor_parallel_size: got 3, allowed: .*(heads|processes in all here)"),
        (512, "^tensor_parallel_size: got 512, allowed: "),
    ],
)
def test_a_number_of_ranks_that_does_not_fit_is_refused(
    stories_model: Path, size: int, message: str
) -> None:
    ranks = Ranks(tensor_parallel_size=size)
    engine = ElasticEngine(ElasticConfig(model=stories_model, name="stories", ranks=ranks))
    with pytest.raises(InvalidArgument, match=message):
        asyncio.run(engine.start())
