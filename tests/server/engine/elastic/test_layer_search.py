"""A search in the engine finds what a search with transformers finds that looks at everything."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.metrics import Evidence, GreedyRemoval, Selection, SingleRemoval
from pruning.quality import token_statistics
from pruning.repair import LayerMap, RepairMaps, fit_repair, save_maps
from server.calibration.layer_search import LayerSearch
from server.engine.base import LayerSelection
from tests.conftest import data_path
from tests.server.engine.elastic import reference
from tests.server.engine.elastic.running_engine import RunningEngine, running_engine

NUM_LAYERS = 5


@pytest.fixture(scope="module")
def engine(stories_model: Path) -> Iterator[RunningEngine]:
    with running_engine(stories_model) as running:
        yield running


@pytest.fixture(scope="module")
def windows(engine: RunningEngine) -> list[list[int]]:
    texts = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))[:40]
    return [engine.engine.tokenize(text)[:128] for text in texts]


@pytest.fixture(scope="module")
def dense(stories_model: Path) -> Any:
    return reference.load(stories_model)


@pytest.fixture(scope="module")
def maps(
    dense: Any, windows: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RepairMaps, Path]:
    """Maps of all layers, and the file that they are in."""
    fitted = fit_repair(
        dense,
        [torch.tensor(window) for window in windows],
        model_fingerprint="sha256:a",
        text_fingerprint="sha256:b",
    )
    path = tmp_path_factory.mktemp("maps") / "repair.safetensors"
    save_maps(fitted, path)
    return fitted, path


def direct_losses(
    dense: Any, windows: list[list[int]], maps: Mapping[int, LayerMap] | None
) -> Callable[[Selection], float]:
    """Return a function from the layers that are left out to the divergence, in nats a token."""

    def logits(window: list[int], skipped: Selection) -> torch.Tensor:
        layers = LayerSelection(skipped, skipped)
        half = len(window) // 2
        return reference.logits_with_skips(dense, window, half, layers, maps)[half - 1 : -1]

    @functools.cache
    def loss(skipped: Selection) -> float:
        sums = torch.zeros(4, dtype=torch.float64)
        for window in windows:
            targets = torch.tensor(window[len(window) // 2 :])
            # Nothing stands in for a layer that runs.
            sums += token_statistics(logits(window, skipped), logits(window, ()), targets)
        return float(sums[3] / sums[0])

    return loss


def direct_order(loss: Callable[[Selection], float], num_removed: int) -> list[int]:
    """Return what greedy removal finds that looks at every layer each time."""
    order: list[int] = []
    for _ in range(num_removed):
        left = [layer for layer in range(NUM_LAYERS) if layer not in order]
        order.append(min(left, key=lambda layer: loss(tuple(sorted([*order, layer])))))
    return order


@pytest.mark.parametrize("with_repair", [False, True])
def test_search(
    engine: RunningEngine,
    dense: Any,
    windows: list[list[int]],
    maps: tuple[RepairMaps, Path],
    *,
    with_repair: bool,
) -> None:
    fitted, path = maps
    repair = engine.run(engine.engine.install_repair(path)) if with_repair else None
    text = windows[:4]
    loss = direct_losses(dense, text, fitted.layers if with_repair else None)
    search = LayerSearch(
        engine.engine,
        text,
        max_tokens=100_000,
        repair=repair,
        kept=None,
        progress=lambda *_: None,
    )

    single = engine.run(search.rank(SingleRemoval()))
    alone = [loss((layer,)) for layer in range(NUM_LAYERS)]
    assert single.scores == pytest.approx(alone, rel=1e-3)
    assert list(single.removal_order) == sorted(range(NUM_LAYERS), key=alone.__getitem__)

    metric = GreedyRemoval(max_removed=3)
    greedy = engine.run(search.rank(metric))
    evaluated = metric.rank(Evidence(NUM_LAYERS, evaluate=lambda them: [loss(s) for s in them]))
    assert greedy.removal_order == evaluated.removal_order
    assert greedy.scores == pytest.approx(evaluated.scores, rel=1e-3)
    if not with_repair:  # with it costs fall, so that a search which saves work may miss the least
        assert list(greedy.removal_order[:3]) == direct_order(loss, 3)
