"""Dedicated engines against the elastic one: the same tokens, the same measurements."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from pruning.metrics import DensePass, dense_pass
from pruning.quality import Quality
from server.engine.base import GenerationRequest, LayerSelection, SamplingOptions, TokenScore
from server.engine.dedicated.engine import DedicatedConfig, DedicatedEngine
from server.errors import FailedPrecondition, InvalidArgument, Unavailable
from tests.conftest import data_path
from tests.server.engine.dedicated.running_engine import NUM_TOKENS, RunningEngines
from tests.server.engine.dedicated.test_checkpoints import plan_of
from tests.server.engine.elastic.running_engine import running_engine

FULL, HALF, THIRD = LayerSelection(), LayerSelection((2, 3), (2, 3)), LayerSelection((2,), (2,))
LEVELS = {"full": FULL, "half": HALF}


@dataclass
class Expected:
    """Results of the elastic engine."""

    prompts: list[list[int]]
    windows: list[list[int]]
    tokens: dict[LayerSelection, list[list[int]]]
    scores: dict[LayerSelection, list[TokenScore]]
    qualities: list[Quality]
    importance: DensePass


@pytest.fixture(scope="module")
def expected(stories_model: Path) -> Expected:
    with running_engine(stories_model) as elastic:
        stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
        ids = [elastic.engine.tokenize(story) for story in stories[:6]]
        prompts = [story[: 5 + 11 * number] for number, story in enumerate(ids)]
        # Longer than a block of the prefix cache, which measurements must not read from.
        windows = [story[:200] for story in ids]
        return Expected(
            prompts,
            windows,
            {
                layers: elastic.generate(prompts, [layers] * len(prompts), NUM_TOKENS)
                for layers in (FULL, HALF, THIRD)
            },
            {
                layers: elastic.run(elastic.engine.score(f"s-{n}", windows[0], 9, layers))
                for n, layers in enumerate((FULL, HALF))
            },
            elastic.run(elastic.engine.measure_quality(windows, [FULL, HALF], lambda *_: None)),
            dense_pass(elastic.run(elastic.engine.measure_importance(windows, lambda *_: None))),
        )


@pytest.fixture(scope="module")
def running(
    expected: Expected, stories_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningEngines]:
    plan = plan_of(stories_model)
    state = tmp_path_factory.mktemp("state")
    made = RunningEngines(stories_model, state, plan)
    made.prepare(LEVELS)
    yield made
    made.close()


def test_tokens_are_those_of_the_elastic_engine(
    running: RunningEngines, expected: Expected
) -> None:
    for layers in (FULL, HALF):
        assert running.generate(expected.prompts, layers) == expected.tokens[layers]


def test_scores_are_those_of_the_elastic_engine(
    running: RunningEngines, expected: Expected
) -> None:
    for layers, scores in expected.scores.items():
        for attempt in range(2):  # the second time, the prefix is in the cache
            found = running.run(
                running.engine.score(f"score-{attempt}", expected.windows[0], 9, layers)
            )
            assert [score.token_id for score in found] == expected.windows[0][9:]
            assert [score.logprob for score in found] == pytest.approx(
                [score.logprob for score in scores], abs=1e-3
            )


def test_quality_is_that_of_the_elastic_engine(running: RunningEngines, expected: Expected) -> None:
    progress: list[tuple[int, int]] = []
    measured = running.run(
        running.engine.measure_quality(
            expected.windows, [FULL, HALF], lambda *step: progress.append(step)
        )
    )
    for quality, other in zip(measured, expected.qualities, strict=True):
        assert quality.num_tokens == other.num_tokens
        assert quality.agreement == other.agreement
        assert quality.perplexity == pytest.approx(other.perplexity, rel=1e-4)
        assert quality.perplexity_stderr == pytest.approx(other.perplexity_stderr, rel=1e-3)
        assert quality.kl_nats is None
    assert progress[-1] == (2 * sum(map(len, expected.windows)),) * 2


def test_importance_is_that_of_the_elastic_engine(
    running: RunningEngines, expected: Expected
) -> None:
    progress: list[tuple[int, int]] = []
    measured = dense_pass(
        running.run(
            running.engine.measure_importance(expected.windows, lambda *step: progress.append(step))
        )
    )
    influence, other = measured.block_influence, expected.importance.block_influence
    assert influence.num_tokens == other.num_tokens
    assert influence.scores == pytest.approx(other.scores, abs=1e-5)
    for quantity in ("relative_magnitude", "norm"):
        found, wanted = (getattr(each, quantity).means for each in (measured, expected.importance))
        assert found == pytest.approx(wanted, rel=1e-4), quantity
    for row, wanted in zip(
        measured.angular_distances or (), expected.importance.angular_distances or (), strict=True
    ):
        assert row == pytest.approx(wanted, abs=1e-4)
    total = sum(map(len, expected.windows))
    assert progress[-1] == (total, total)


def test_what_it_cannot_start_changes_nothing(running: RunningEngines, expected: Expected) -> None:
    before = running.processes()
    # No cache is left for a whole context.
    running.engine._total_kv_cache_bytes, kept = 1 << 12, running.engine._total_kv_cache_bytes
    with pytest.raises(FailedPrecondition, match="depth 4: kv_cache_gib: got"):
        running.prepare({**LEVELS, "third": THIRD})
    running.engine._total_kv_cache_bytes = kept
    assert running.processes() == before
    assert not running.engine.can_run(THIRD)
    assert running.generate(expected.prompts, HALF) == expected.tokens[HALF]


def test_levels_come_and_go_without_disturbing_others(
    running: RunningEngines, expected: Expected
) -> None:
    async def everything() -> list[int]:
        prompt = expected.prompts[3]
        options = SamplingOptions(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        stream = running.engine.generate(GenerationRequest("slow", prompt, HALF, options))
        tokens = list((await anext(stream)).token_ids)
        levels = {"full": FULL, "third": THIRD}
        await running.engine.prepare(running.plan, levels, lambda *_: None)
        assert await running.tokens("new", expected.prompts[2], THIRD) == expected.tokens[THIRD][2]
        running.engine.release_others(levels.values())
        # No request can get it any more; the one that has it goes on.
        assert not running.engine.can_run(HALF)
        with pytest.raises(Unavailable, match="has just been removed"):
            await running.tokens("late", prompt, HALF)
        async for delta in stream:
            tokens += delta.token_ids
        while running.engine._retirements:
            await asyncio.sleep(0.01)
        return tokens

    assert running.run(everything()) == expected.tokens[HALF][3]
    assert len(running.processes()) == 2


def test_a_killed_engine_is_started_again_and_others_go_on(
    running: RunningEngines, expected: Expected
) -> None:
    (process,) = running.engine._engines[THIRD].llm.process_ids
    prompt = expected.prompts[4]

    async def everything() -> list[int]:
        long = SamplingOptions(temperature=0.0, max_tokens=400, ignore_eos=True)
        doomed = running.engine.generate(GenerationRequest("doomed", prompt, THIRD, long))
        await anext(doomed)
        options = SamplingOptions(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        other = running.engine.generate(GenerationRequest("other", prompt, FULL, options))
        tokens = list((await anext(other)).token_ids)
        psutil.Process(process).kill()
        with pytest.raises(Unavailable, match="engine of depth 4 has died; it is being started"):
            async for _ in doomed:
                pass
        assert not running.engine.can_run(THIRD)
        assert running.engine.can_run(FULL)
        assert running.engine.is_alive
        with pytest.raises(Unavailable, match="engine of depth 4 has died"):
            await running.tokens("refused", prompt, THIRD)
        async for delta in other:
            tokens += delta.token_ids
        while not running.engine.can_run(THIRD):
            await asyncio.sleep(0.05)
        return tokens

    assert running.run(everything()) == expected.tokens[FULL][4]
    assert running.generate(expected.prompts, THIRD) == expected.tokens[THIRD]
    assert running.restarts == 1


def test_without_a_dense_level_there_is_no_agreement(
    running: RunningEngines, expected: Expected
) -> None:
    async def measure() -> list[Quality]:
        running.engine.release_others([THIRD])
        return await running.engine.measure_quality(expected.windows, [THIRD], lambda *_: None)

    (quality,) = running.run(measure())
    assert quality.agreement is None
    assert quality.perplexity > 1


@pytest.mark.parametrize(
    ("engine_args", "problem"),
    [
        ({"model": "x"}, "engine_args.model: got 'x', allowed: the setting model instead"),
        ({"enforce_eagre": True}, "allowed: an argument of vLLM's engine, such as enforce_eager"),
    ],
)
def test_arguments_are_checked_first(
    stories_model: Path, tmp_path: Path, engine_args: dict[str, object], problem: str
) -> None:
    config = DedicatedConfig(
        model=stories_model, name="s", engine_args=engine_args, state_dir=tmp_path
    )
    with pytest.raises(InvalidArgument, match=problem):
        asyncio.run(DedicatedEngine(config).start())


def test_layers_of_the_model_that_is_named_for_it_are_ranked(
    stories_model: Path, expected: Expected, tmp_path: Path
) -> None:
    """As for a quantized model, which transformers might not load."""
    quantized = tmp_path / "quantized"
    shutil.copytree(stories_model, quantized)
    (weights,) = quantized.glob("*.safetensors")
    tensors = {
        name: tensor.round() if "layers" in name else tensor
        for name, tensor in load_file(weights).items()
    }
    weights.unlink()
    save_file(tensors, weights, metadata={"format": "pt"})
    engine = DedicatedEngine(
        DedicatedConfig(
            model=quantized,
            name="quantized",
            dtype="float32",
            kv_cache_gib=0.25,
            ranked_model=stories_model,
        )
    )

    async def scores() -> Sequence[float]:
        await engine.start()
        found = await engine.measure_importance(expected.windows, lambda *_: None)
        await engine.shutdown()
        return dense_pass(found).block_influence.scores

    wanted = expected.importance.block_influence.scores
    assert asyncio.run(scores()) == pytest.approx(wanted, abs=1e-5)
