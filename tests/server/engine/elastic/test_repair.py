"""Greedy float32 tokens of the elastic engine with repair, against transformers with the same."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pruning.decoder import StandIn
from pruning.quality import quality_of_windows, token_statistics
from pruning.repair import (
    GatedMlps,
    LayerMap,
    RepairError,
    RepairMaps,
    fit_repair,
    heal,
    load_maps,
    maps_fingerprint,
    save_gated_mlps,
    save_maps,
)
from server.engine.base import LayerSelection
from server.errors import FailedPrecondition
from tests.conftest import data_path
from tests.gated_mlps import random_mlps
from tests.server.engine.elastic import reference
from tests.server.engine.elastic.running_engine import RunningEngine, running_engine

NUM_TOKENS = 32
ORDER = (2, 3, 1, 4, 0)
NUM_LAYERS = len(ORDER)


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    layers: LayerSelection
    expected: list[int]


@pytest.fixture(scope="module")
def dense(stories_model: Path) -> Any:
    return reference.load(stories_model)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))[:40])


@pytest.fixture(scope="module")
def engine(stories_model: Path) -> Iterator[RunningEngine]:
    with running_engine(stories_model) as running:
        yield running


@pytest.fixture(scope="module")
def maps(dense: Any, engine: RunningEngine, texts: list[str]) -> RepairMaps:
    """Maps of all layers but one, so that there is a layer that nothing stands in for."""
    windows = [torch.tensor(engine.engine.tokenize(text)[:128]) for text in texts[6:]]
    fitted = fit_repair(dense, windows, model_fingerprint="sha256:aa", text_fingerprint="sha256:b")
    return replace(fitted, layers={i: m for i, m in fitted.layers.items() if i != ORDER[2]})


@pytest.fixture(scope="module")
def path(maps: RepairMaps, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("maps") / "repair.safetensors"
    save_maps(maps, path)
    return path


@pytest.fixture(scope="module")
def repair(engine: RunningEngine, path: Path) -> str:
    """The fingerprint of the maps, which the engine has loaded."""
    return engine.run(engine.engine.install_repair(path))


def selection(prefill_depth: int, decode_depth: int, repair: str | None) -> LayerSelection:
    prefill, decode = (
        tuple(sorted(ORDER[: NUM_LAYERS - depth])) for depth in (prefill_depth, decode_depth)
    )
    return LayerSelection(prefill, decode, repair)


@dataclass(frozen=True)
class Healed:
    """Healed maps or gated MLPs of some skipped layers, and the file that they are in."""

    skipped: tuple[int, ...]
    stand_ins: RepairMaps | GatedMlps
    path: Path

    def selections(self) -> list[LayerSelection]:
        """Return the selections that they serve."""
        fingerprint = maps_fingerprint(self.path)
        pairs = [(self.skipped, self.skipped), (self.skipped, ()), ((), self.skipped)]
        return [LayerSelection(*pair, fingerprint) for pair in pairs]


@pytest.fixture(scope="module")
def healed(
    engine: RunningEngine,
    dense: Any,
    texts: list[str],
    maps: RepairMaps,
    repair: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Healed]:
    """Healed maps of two depths, which the engine has loaded beside the others."""
    windows = [torch.tensor(engine.engine.tokenize(text)[:128]) for text in texts[6:]]
    directory = tmp_path_factory.mktemp("healed")
    found = []
    for depth, start in ((3, maps), (2, None)):
        trained = heal(
            dense,
            windows,
            ORDER[: NUM_LAYERS - depth],
            start,
            model_fingerprint="sha256:aa",
            text_fingerprint="sha256:b",
            steps=20,
        )
        assert trained.healing is not None
        assert trained.healing.loss < trained.healing.first_loss
        path = directory / f"{depth}.safetensors"
        found.append(Healed(trained.healing.skipped, trained, path))
        save_maps(trained, found[-1].path)
        engine.run(engine.engine.install_repair(found[-1].path))
    return found


@pytest.fixture(scope="module")
def gated(
    engine: RunningEngine, dense: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[Healed]:
    """Gated MLPs of the layers of a depth that has healed maps, too, and of two runs of layers."""
    directory = tmp_path_factory.mktemp("gated")
    found = []
    for skipped in ((2, 3), (0, 1, 3)):
        mlps = random_mlps(skipped, num_layers=NUM_LAYERS, hidden_size=dense.config.hidden_size)
        found.append(Healed(skipped, mlps, directory / f"{len(skipped)}.safetensors"))
        save_gated_mlps(mlps, found[-1].path)
        engine.run(engine.engine.install_repair(found[-1].path))
    return found


@pytest.fixture(scope="module")
def stand_ins_of(
    maps: RepairMaps, repair: str, healed: list[Healed], gated: list[Healed]
) -> dict[str | None, Mapping[int, StandIn]]:
    of: dict[str | None, Mapping[int, StandIn]] = {None: {}, repair: maps.layers}
    for each in (*healed, *gated):
        of[maps_fingerprint(each.path)] = each.stand_ins.layers
    return of


@pytest.fixture(scope="module")
def cases(
    engine: RunningEngine,
    dense: Any,
    texts: list[str],
    repair: str,
    healed: list[Healed],
    gated: list[Healed],
    stand_ins_of: dict[str | None, Mapping[int, StandIn]],
) -> list[Case]:
    """Every pair of depths with repair, every depth without, and those that what is trained serves.

    The tokens are those that transformers generates.
    """
    prompts = [engine.engine.tokenize(text)[: 5 + 11 * n] for n, text in enumerate(texts[:6])]
    depths = range(1, NUM_LAYERS + 1)
    selections = [selection(a, b, repair) for a, b in itertools.product(depths, repeat=2)]
    selections += [selection(depth, depth, None) for depth in depths]
    selections += [layers for each in (*healed, *gated) for layers in each.selections()]
    return [
        Case(
            prompt,
            layers,
            reference.generate_with_skips(
                dense, prompt, NUM_TOKENS, layers, stand_ins_of[layers.repair]
            ),
        )
        for prompt, layers in zip(itertools.cycle(prompts), selections, strict=False)
    ]


def generated(engine: RunningEngine, cases: list[Case]) -> list[list[int]]:
    return engine.generate(
        [case.prompt for case in cases], [case.layers for case in cases], NUM_TOKENS
    )


def test_every_pair_of_depths_alone(engine: RunningEngine, cases: list[Case]) -> None:
    for case in cases:
        assert generated(engine, [case]) == [case.expected], case.layers


def test_gated_mlps_make_a_difference(dense: Any, cases: list[Case], gated: list[Healed]) -> None:
    """Or the tokens would not show whether they stood in."""
    fingerprints = {maps_fingerprint(each.path) for each in gated}
    with_mlps = [case for case in cases if case.layers.repair in fingerprints]
    assert len(with_mlps) == 6
    for case in with_mlps:
        plain = replace(case.layers, repair=None)
        skipped = reference.generate_with_skips(dense, case.prompt, NUM_TOKENS, plain)
        assert skipped != case.expected, case.layers


def test_all_mixed_in_one_batch(engine: RunningEngine, cases: list[Case]) -> None:
    shuffled = random.Random(0).sample(cases, len(cases))
    assert generated(engine, shuffled) == [case.expected for case in shuffled]


def test_chunked_prefill_and_preemption(
    stories_model: Path,
    path: Path,
    healed: list[Healed],
    gated: list[Healed],
    cases: list[Case],
) -> None:
    """Prompts are cut into chunks, and requests that need more memory are recomputed."""
    settings = {
        "max_num_batched_tokens": 48,
        "enable_chunked_prefill": True,
        "num_gpu_blocks_override": 9,
        "block_size": 32,
    }
    with running_engine(
        stories_model, max_num_seqs=8, max_context=128, engine_args=settings
    ) as small:
        for file in (path, *(each.path for each in (*healed, *gated))):
            small.run(small.engine.install_repair(file))
        assert generated(small, cases) == [case.expected for case in cases]


def test_maps_are_loaded_again_after_a_crash(
    stories_model: Path,
    path: Path,
    healed: list[Healed],
    gated: list[Healed],
    repair: str,
    cases: list[Case],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Those whose file was damaged meanwhile are reported, and refused."""
    damaged = tmp_path / "damaged"
    damaged.write_bytes(healed[1].path.read_bytes())
    with running_engine(stories_model) as other:
        for file in (path, healed[0].path, damaged, *(each.path for each in gated)):
            other.run(other.engine.install_repair(file))
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        for process_id in other.engine.process_ids:
            os.kill(process_id, signal.SIGKILL)
        while other.engine.is_alive:
            other.run(asyncio.sleep(0.01))
        other.run(other.engine.shutdown())
        other.run(other.engine.start())
        gone = maps_fingerprint(healed[1].path)
        assert "damaged: sha256: its tensors are not what was written" in caplog.text
        assert not other.engine.has_repair(gone)
        assert other.engine.has_repair(repair)
        kept = [case for case in cases if case.layers.repair != gone]
        assert generated(other, kept) == [case.expected for case in kept]
        with pytest.raises(FailedPrecondition, match=f"maps {gone}, but the engine has {repair}, "):
            generated(other, [case for case in cases if case.layers.repair == gone])


def test_requests_with_and_without_repair_share_no_prefix(
    engine: RunningEngine, dense: Any, texts: list[str], maps: RepairMaps, repair: str
) -> None:
    """Keys and values behind a skipped layer depend on what stood in for it."""
    prompt = engine.engine.tokenize(texts[0])[:100]
    layers = selection(2, 2, repair)
    without = replace(layers, repair=None)
    expected = {
        layers: reference.generate_with_skips(dense, prompt, NUM_TOKENS, layers, maps.layers),
        without: reference.generate_with_skips(dense, prompt, NUM_TOKENS, without),
    }
    assert expected[layers] != expected[without]
    for chosen in (layers, without, layers, without):
        assert engine.generate([prompt], [chosen], NUM_TOKENS) == [expected[chosen]]


def test_an_engine_that_is_started_again(
    stories_model: Path, path: Path, cases: list[Case], tmp_path: Path
) -> None:
    """It has its maps again, unless their file is damaged, gone or another: then it has none."""
    repair = maps_fingerprint(path)
    chosen = [case for case in cases if case.layers.repair == repair][::4]
    kept = tmp_path / "maps"
    sound = path.read_bytes()

    def damage() -> None:
        kept.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))

    def replace_by_others() -> None:
        others = load_maps(path)
        save_maps(replace(others, text_fingerprint="sha256:others"), kept)

    with running_engine(stories_model) as running:
        plain = [case for case in cases if case.layers.repair is None]
        faults: list[Callable[[], None]] = [damage, kept.unlink, replace_by_others]
        for fault in (None, *faults):
            kept.write_bytes(sound)
            assert running.run(running.engine.install_repair(kept)) == repair
            assert generated(running, chosen) == [case.expected for case in chosen]
            if fault is not None:
                fault()
            kill(running)
            assert running.engine.has_repair(repair), "it may still be loaded again"
            running.run(running.engine.start())
            assert generated(running, plain) == [case.expected for case in plain]
            if fault is not None:
                assert not running.engine.has_repair(repair)
                with pytest.raises(FailedPrecondition, match="but the engine has none"):
                    generated(running, chosen)
            else:
                assert generated(running, chosen) == [case.expected for case in chosen]


def kill(running: RunningEngine) -> None:
    processes = [psutil.Process(pid) for pid in running.engine.process_ids]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)

    async def until_dead() -> None:
        while running.engine.is_alive:
            await asyncio.sleep(0.01)

    running.run(until_dead())


def test_quality_is_measured_with_repair(
    engine: RunningEngine,
    dense: Any,
    texts: list[str],
    repair: str,
    healed: list[Healed],
    gated: list[Healed],
    stand_ins_of: dict[str | None, Mapping[int, StandIn]],
) -> None:
    windows = [engine.engine.tokenize(text)[:96] for text in texts[:4]]
    selections = [selection(3, 3, repair), selection(3, 3, None), selection(2, 4, repair)]
    selections += healed[0].selections() + gated[1].selections()
    measured = engine.run(
        engine.engine.measure_quality(windows, selections, lambda done, total: None)
    )
    for layers, quality in zip(selections, measured, strict=True):
        sums = []
        for window in windows:
            half = len(window) // 2
            logits = reference.logits_with_skips(
                dense, window, half, layers, stand_ins_of[layers.repair]
            )
            whole = reference.logits_with_skips(dense, window, half, LayerSelection())
            scored = slice(half - 1, len(window) - 1)
            targets = torch.tensor(window[half:])
            sums.append(token_statistics(logits[scored], whole[scored], targets).tolist())
        expected = quality_of_windows(sums)
        assert quality.perplexity == pytest.approx(expected.perplexity, rel=1e-4), layers
        assert quality.kl_nats == pytest.approx(expected.kl_nats, rel=1e-3), layers
    assert measured[3].perplexity < measured[0].perplexity < measured[1].perplexity


def test_the_engine_fits_what_transformers_fits(
    engine: RunningEngine, dense: Any, texts: list[str], tmp_path: Path
) -> None:
    windows = [engine.engine.tokenize(text)[:128] for text in texts]
    done: list[tuple[int, int]] = []
    engine.run(
        engine.engine.fit_repair(
            windows,
            tmp_path / "fitted",
            model_fingerprint="sha256:aa",
            text_fingerprint="sha256:bb",
            progress=lambda *counts: done.append(counts),
        )
    )
    fitted = load_maps(tmp_path / "fitted")
    expected = fit_repair(
        dense,
        [torch.tensor(window) for window in windows],
        model_fingerprint="sha256:aa",
        text_fingerprint="sha256:bb",
    )
    total = sum(map(len, windows))
    assert done[-1] == (total, total)
    assert replace(fitted, layers=expected.layers) == expected
    for layer, layer_map in expected.layers.items():
        assert fitted.layers[layer].ridge == layer_map.ridge
        assert fitted.layers[layer].unexplained == pytest.approx(layer_map.unexplained, rel=1e-3)
        difference = (fitted.layers[layer].weight - layer_map.weight).norm()
        assert difference < 0.01 * layer_map.weight.norm(), layer


def test_too_little_text_to_fit_is_refused(engine: RunningEngine, tmp_path: Path) -> None:
    def fit(windows: list[list[int]]) -> None:
        engine.run(
            engine.engine.fit_repair(
                windows,
                tmp_path / "fitted",
                model_fingerprint="sha256:aa",
                text_fingerprint="sha256:bb",
                progress=lambda *_: None,
            )
        )

    with pytest.raises(RepairError, match="text: got 1 text windows, allowed: 2 or more"):
        fit([[1, 2, 3]])
    with pytest.raises(RepairError, match="text: got 100 tokens to fit repair on, allowed: 128"):
        fit([list(range(1, 101)), [1, 2, 3]])
    with pytest.raises(RepairError, match=r"fitted|No such file"):
        engine.run(
            engine.engine.fit_repair(
                [list(range(1, 129)), [5, 6, 7]] * 2,
                tmp_path / "absent" / "fitted",
                model_fingerprint="sha256:aa",
                text_fingerprint="sha256:bb",
                progress=lambda *_: None,
            )
        )


def test_maps_that_are_not_loaded_are_refused(engine: RunningEngine, repair: str) -> None:
    layers = LayerSelection((1,), (1,), "sha256:others")
    with pytest.raises(
        FailedPrecondition, match=f"maps sha256:others, but the engine has {repair}"
    ):
        engine.generate([[1, 2, 3]], [layers], 1)
    with pytest.raises(FailedPrecondition, match="maps sha256:others"):
        engine.run(engine.engine.score("one", [1, 2, 3], 1, layers))
    with pytest.raises(FailedPrecondition, match="maps sha256:others"):
        engine.run(engine.engine.measure_quality([[1, 2, 3]], [layers], lambda *_: None))


def test_what_was_trained_for_other_layers_is_refused(
    engine: RunningEngine, healed: list[Healed], gated: list[Healed]
) -> None:
    for each in (healed[0], gated[0]):
        fingerprint = maps_fingerprint(each.path)
        for prefill, decode in (((2,), (2,)), ((2, 3), (3,)), ((), (1, 2, 3)), ((), ())):
            layers = LayerSelection(prefill, decode, fingerprint)
            problem = re.escape(
                f"repair: {fingerprint} was trained for the skipped layers [2, 3], but the request "
                f"skips {list(prefill)} for its prompt and {list(decode)} for what it generates"
            )
            with pytest.raises(FailedPrecondition, match=problem):
                engine.generate([[1, 2, 3]], [layers], 1)
            with pytest.raises(FailedPrecondition, match=problem):
                engine.run(engine.engine.score("one", [1, 2, 3], 1, layers))
            with pytest.raises(FailedPrecondition, match=problem):
                engine.run(engine.engine.measure_quality([[1, 2, 3]], [layers], lambda *_: None))


def test_maps_that_do_not_fit_leave_the_old_ones(
    engine: RunningEngine, path: Path, cases: list[Case], tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    save_maps(
        RepairMaps({0: LayerMap(torch.ones(8, 8), 1.0, 0.5)}, NUM_LAYERS, "a", "b", 1), foreign
    )
    damaged = tmp_path / "damaged"
    data = path.read_bytes()
    damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    mlps = tmp_path / "mlps"
    save_gated_mlps(random_mlps((1, 2), num_layers=NUM_LAYERS, hidden_size=8), mlps)
    deeper = tmp_path / "deeper"
    save_gated_mlps(random_mlps((1, 6), num_layers=7, hidden_size=64), deeper)
    for file, problem in [
        (mlps, "hidden_size: the MLPs are of a model with 8, allowed: 64"),
        (deeper, "num_layers: the MLPs are of a model with 7, allowed: 5"),
        (foreign, "hidden_size: the maps are of a model with 8, allowed: 64"),
        (damaged, "sha256: its tensors are not what was written"),
    ]:
        with pytest.raises(RepairError, match=problem):
            engine.run(engine.engine.install_repair(file))
    with pytest.raises(FileNotFoundError):
        engine.run(engine.engine.install_repair(tmp_path / "absent"))
    assert generated(engine, cases[:3]) == [case.expected for case in cases[:3]]
