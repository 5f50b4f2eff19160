"""Default levels of the demo model, found while it serves, and measured again from outside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from server.calibration.text_windows import text_windows
from server.model.demo_corpus import Part, documents
from server.model.source import DEMO_MODEL
from server.rpc.client import Client
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2
from tests.e2e.running_server import RunningServer, measurements_in, running_server, until

QUALITY_TOKENS = 4096
NUM_LAYERS = 16

Depths = tuple[int, int]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Has begun to serve before anything was measured, and has measured everything since."""
    with running_server(
        tmp_path_factory.mktemp("levels"),
        levels=None,
        startup_seconds=0,
        quality_tokens=QUALITY_TOKENS,
    ) as server:
        with server.client() as client:
            until(lambda: not client.get_status().unmeasured, lambda: server.log)
        yield server


class Scored:
    """Losses of the second half of each window of held-out text, given the first, by Score."""

    def __init__(self, client: Client) -> None:
        self._client = client
        tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
        model = client.get_model()

        def tokenize(text: str, *, special_tokens: bool = True) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=special_tokens).ids)

        self._windows = text_windows(
            tokenize,
            documents([Part.HELD_OUT]),
            max_context=model.max_context,
            max_tokens=QUALITY_TOKENS,
            vocab_size=model.vocab_size,
        )
        self._losses: dict[Depths, list[float]] = {}

    def losses(self, depths: Depths) -> list[float]:
        """Return the loss of each window, in nats."""
        if depths not in self._losses:
            self._losses[depths] = [self._loss(window, depths) for window in self._windows]
        return self._losses[depths]

    def ratio(self, depths: Depths) -> tuple[float, float]:
        """Return the log of perplexity divided by that of dense, and its standard error."""
        dense = self.losses((NUM_LAYERS, NUM_LAYERS))
        differences = np.array(self.losses(depths)) - np.array(dense)
        sizes = np.array([len(window) - len(window) // 2 for window in self._windows])
        log_ratio = differences.sum() / sizes.sum()
        num = len(sizes)
        squares = ((differences - log_ratio * sizes) ** 2).sum()
        return float(log_ratio), math.sqrt(num / (num - 1) * squares) / float(sizes.sum())

    def _loss(self, window: list[int], depths: Depths) -> float:
        half = len(window) // 2
        response = self._client.score(
            inference_pb2.ScoreRequest(
                context_ids=inference_pb2.TokenIds(ids=window[:half]),
                token_ids=inference_pb2.TokenIds(ids=window[half:]),
                depth=common_pb2.Depth(layers=depths[1]),
                prefill_depth=common_pb2.Depth(layers=depths[0]),
            )
        )
        return -response.total_logprob


def test_levels_hold_what_they_promise(server: RunningServer) -> None:
    with server.client() as client:
        dense, *others = client.get_model().levels
        scored = Scored(client)
        assert (dense.name, dense.decode_layers, dense.is_default) == ("dense", NUM_LAYERS, True)
        assert not dense.HasField("max_quality_loss")
        assert {"fast", "turbo"} <= {level.name for level in others}
        for level in others:
            is_prompt = level.name == "prompt"
            depths = level.prefill_layers, level.decode_layers
            assert depths[1] == (NUM_LAYERS if is_prompt else depths[0])
            most = math.log1p(level.max_quality_loss)
            log_ratio, stderr = scored.ratio(depths)
            assert log_ratio + stderr <= most + 1e-3
            shown = level.quality.perplexity / dense.quality.perplexity
            assert math.log(shown) == pytest.approx(log_ratio, abs=1e-3)
            if depths[0] > 1:
                less = depths[0] - 1
                log_ratio, stderr = scored.ratio((less, NUM_LAYERS if is_prompt else less))
                assert log_ratio + stderr > most - 1e-3


def test_what_was_measured_while_serving_is_told_and_shown(server: RunningServer) -> None:
    assert "to be measured while serving: level balanced; level fast; level turbo" in server.log
    assert "levels, now that they have been measured: dense=16, " in server.log
    with server.client() as client:
        model = client.get_model()
        status = client.get_status()
    assert not status.level_problems
    assert {row.decode_layers for row in model.depths} == set(range(1, NUM_LAYERS + 1))
    assert all(level.HasField("quality") and level.HasField("speed") for level in model.levels)
    losses = server.scrape().by_label("fathom_level_max_quality_loss", "level")
    assert losses == {
        level.name: level.max_quality_loss for level in model.levels if level.name != "dense"
    }


def test_a_second_start_has_the_same_levels_at_once(server: RunningServer, tmp_path: Path) -> None:
    state = server.copy_state(tmp_path)
    with (
        running_server(
            tmp_path, levels=None, state_dir=state, startup_seconds=0, quality_tokens=QUALITY_TOKENS
        ) as again,
        again.client() as client,
        server.client() as other,
    ):
        assert measurements_in(again.log) == []
        assert not client.get_status().unmeasured
        assert list(client.get_model().levels) == list(other.get_model().levels)


def test_set_levels_by_quality(server: RunningServer) -> None:
    with server.client() as client:
        before = client.get_model()
        specs = [
            control_pb2.LevelSpec(name="full", depth=common_pb2.Depth(layers=NUM_LAYERS)),
            control_pb2.LevelSpec(name="half", max_quality_loss=0.5),
            control_pb2.LevelSpec(name="perfect", max_quality_loss=0),
        ]
        levels = client.set_levels(control_pb2.SetLevelsRequest(levels=specs)).levels
        assert [level.max_quality_loss for level in levels[1:]] == [0.5, 0]
        assert levels[1].decode_layers < NUM_LAYERS == levels[2].decode_layers
        (problem,) = client.get_status().level_problems
        assert problem.startswith("level perfect: no depth was found that loses at most 0 in")
        assert problem in server.log
        dense = before.levels[0].quality.perplexity
        assert levels[1].quality.perplexity / dense <= 1.5
