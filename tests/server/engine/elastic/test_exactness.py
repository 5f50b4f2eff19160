"""Greedy float32 tokens of the elastic engine against models that are really pruned."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.metrics import DensePassSums, dense_pass
from pruning.quality import quality_of_windows, token_statistics
from server.engine.base import LayerSelection, LoadInfo
from tests.conftest import data_path
from tests.server.engine.elastic import reference
from tests.server.engine.elastic.running_engine import NAMESPACE, RunningEngine, running_engine

NUM_TOKENS = 40
# Least important first; what matters here is only that it is an order.
ORDER = (2, 3, 1, 4, 0)
NUM_LAYERS = len(ORDER)


def skips(depth: int) -> tuple[int, ...]:
    return tuple(sorted(ORDER[: NUM_LAYERS - depth]))


def selection(prefill_depth: int, decode_depth: int) -> LayerSelection:
    return LayerSelection(skips(prefill_depth), skips(decode_depth))


@pytest.fixture(scope="module")
def engine(stories_model: Path) -> Iterator[RunningEngine]:
    with running_engine(stories_model, compile_layers=True) as running:
        yield running


@pytest.fixture(scope="module")
def dense(stories_model: Path) -> Any:
    return reference.load(stories_model)


@pytest.fixture(scope="module")
def prompts(engine: RunningEngine) -> list[list[int]]:
    stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
    return [
        engine.engine.tokenize(story)[: 5 + 11 * number] for number, story in enumerate(stories[:6])
    ]


def test_every_depth_equals_the_cut_checkpoint(
    engine: RunningEngine, prompts: list[list[int]], stories_model: Path
) -> None:
    for depth in range(1, NUM_LAYERS + 1):
        model = reference.cut(stories_model, skips(depth))
        expected = [reference.generate(model, prompt, NUM_TOKENS) for prompt in prompts]
        assert (
            engine.generate(prompts, [selection(depth, depth)] * len(prompts), NUM_TOKENS)
            == expected
        ), f"depth {depth}"


@pytest.fixture(scope="module")
def split_cases(
    prompts: list[list[int]], dense: Any
) -> list[tuple[list[int], LayerSelection, list[int]]]:
    """Every pair of depths, each with a prompt and what transformers generates."""
    pairs = itertools.product(range(1, NUM_LAYERS + 1), repeat=2)
    return [
        (prompt, layers, reference.generate_with_skips(dense, prompt, NUM_TOKENS, layers))
        for (prefill, decode), prompt in zip(pairs, itertools.cycle(prompts), strict=False)
        for layers in [selection(prefill, decode)]
    ]


def test_every_pair_of_depths_alone_and_mixed_in_one_batch(
    engine: RunningEngine, split_cases: list[tuple[list[int], LayerSelection, list[int]]]
) -> None:
    for prompt, layers, expected in split_cases:
        assert engine.generate([prompt], [layers], NUM_TOKENS) == [expected], layers
    shuffled = random.Random(0).sample(split_cases, len(split_cases))
    assert engine.generate(
        [case[0] for case in shuffled], [case[1] for case in shuffled], NUM_TOKENS
    ) == [case[2] for case in shuffled]


def test_preempted_requests_equal_undisturbed_ones(
    stories_model: Path, split_cases: list[tuple[list[int], LayerSelection, list[int]]]
) -> None:
    """Requests need more KV blocks than there are, so some are recomputed half-way."""
    settings = {"num_gpu_blocks_override": 9, "block_size": 32}
    with running_engine(stories_model, max_context=128, engine_args=settings) as small:
        assert small.generate(
            [case[0] for case in split_cases], [case[1] for case in split_cases], NUM_TOKENS
        ) == [case[2] for case in split_cases]
        assert num_preemptions(stories_model.name) > 0, "the cache was not small enough"


def num_preemptions(model_name: str) -> float:
    from prometheus_client import REGISTRY

    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:num_preemptions_total"
        and sample.labels.get("model_name") == model_name
    )


def test_chunked_prefill_equals_whole_prefill(
    stories_model: Path, split_cases: list[tuple[list[int], LayerSelection, list[int]]]
) -> None:
    settings = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True}
    with running_engine(stories_model, max_num_seqs=8, engine_args=settings) as chunked:
        assert chunked.generate(
            [case[0] for case in split_cases], [case[1] for case in split_cases], NUM_TOKENS
        ) == [case[2] for case in split_cases]


def test_prefix_cache_is_hit_and_changes_nothing(
    engine: RunningEngine, dense: Any, prompts: list[list[int]]
) -> None:
    """The same long prompt at every depth, twice; then continued from its own answer."""
    prompt = list(itertools.islice(itertools.cycle(prompts[-1]), 300))
    for layers in [*(selection(d, d) for d in range(1, NUM_LAYERS + 1)), selection(3, 5)]:
        expected = reference.generate_with_skips(dense, prompt, 8, layers)
        for _ in range(2):
            assert engine.generate([prompt], [layers], 8) == [expected]
        longer = prompt + expected
        assert engine.generate([longer], [layers], 8) == [
            reference.generate_with_skips(dense, longer, 8, layers)
        ]
    assert num_cached(engine, prompt, selection(4, 4)) > 0
    assert num_cached(engine, prompt, selection(4, 5)) == 0, "its cache may hold decoded tokens"


def num_cached(engine: RunningEngine, prompt: list[int], layers: LayerSelection) -> int:
    from server.engine.base import GenerationRequest, SamplingOptions

    async def cached() -> int:
        request = GenerationRequest(
            f"cached-{layers}", prompt, layers, SamplingOptions(max_tokens=1), NAMESPACE
        )
        return max([d.num_cached_tokens async for d in engine.engine.generate(request)])

    return engine.run(cached())


@pytest.mark.parametrize(("prefill", "decode"), [(5, 5), (3, 3), (2, 5), (5, 2)])
def test_scores_are_those_of_transformers(
    engine: RunningEngine, dense: Any, prompts: list[list[int]], prefill: int, decode: int
) -> None:
    token_ids, num_context = prompts[-1], 12
    layers = selection(prefill, decode)
    scores = engine.run(engine.engine.score(f"score-{layers}", token_ids, num_context, layers))
    logits = reference.logits_with_skips(dense, token_ids, num_context, layers)
    expected = logits.log_softmax(-1)[torch.arange(len(token_ids) - 1), token_ids[1:]]
    assert [score.token_id for score in scores] == token_ids[num_context:]
    torch.testing.assert_close(
        torch.tensor([score.logprob for score in scores]), expected[num_context - 1 :]
    )


def test_importance_is_the_published_one_and_equal_in_transformers(
    engine: RunningEngine, dense: Any
) -> None:
    from pruning.importance import measure_block_influence

    stories = json.loads(data_path("text/tinystories_1000.json").read_text("utf-8"))
    windows = [engine.engine.tokenize(story)[:256] for story in stories[:100]]
    seen: list[tuple[int, int]] = []
    sums = engine.run(
        engine.engine.measure_importance(windows, lambda *counts: seen.append(counts))
    )
    measured = dense_pass(sums).block_influence
    expected = measure_block_influence(dense, [torch.tensor([window]) for window in windows])
    assert measured.num_tokens == expected.num_tokens == sum(map(len, windows))
    assert measured.scores == pytest.approx(expected.scores, abs=1e-5)
    assert measured.stderrs == pytest.approx(expected.stderrs, rel=1e-3)
    assert measured.scores == pytest.approx((0.230, 0.144, 0.116, 0.122, 0.153), abs=0.01)
    assert seen[-1] == (measured.num_tokens, measured.num_tokens)


def test_importance_ignores_requests_that_run_meanwhile(
    engine: RunningEngine, prompts: list[list[int]]
) -> None:
    import asyncio

    windows = [prompt * 2 for prompt in prompts]
    alone = dense_pass(engine.run(engine.engine.measure_importance(windows, lambda *_: None)))

    async def both() -> Any:
        from server.engine.base import GenerationRequest, SamplingOptions

        async def traffic(number: int) -> int:
            request = GenerationRequest(
                f"traffic-{number}",
                prompts[number],
                selection(2, 4),
                SamplingOptions(max_tokens=60),
            )
            return len([delta async for delta in engine.engine.generate(request)])

        measured, *_ = await asyncio.gather(
            engine.engine.measure_importance(windows, lambda *_: None), *map(traffic, range(6))
        )
        return measured

    together = dense_pass(engine.run(both()))
    expected, measured = alone.block_influence, together.block_influence
    assert measured.scores == pytest.approx(expected.scores, abs=1e-6)
    assert together.num_texts == alone.num_texts == len(windows)
    for of_layer, alone_of_layer in zip(
        together.angular_distances or (), alone.angular_distances or (), strict=True
    ):
        assert of_layer == pytest.approx(alone_of_layer, abs=1e-5)


def test_what_one_pass_shows_is_what_the_definitions_say(
    engine: RunningEngine, dense: Any, prompts: list[list[int]]
) -> None:
    windows = [prompt * 3 for prompt in prompts]
    sums = engine.run(engine.engine.measure_importance(windows, lambda *_: None))
    assert [each.num_tokens for each in sums] == list(map(len, windows)), "one group each"
    assert [each.num_texts for each in sums] == [1] * len(windows)
    reference.check_dense_pass(dense_pass(sums), dense, windows)
    for window, each in zip(windows, sums, strict=True):
        reference.check_dense_pass(dense_pass([each]), dense, [window])


def test_a_text_that_is_longer_than_a_step_has_one_last_token(
    engine: RunningEngine, dense: Any, prompts: list[list[int]]
) -> None:
    longest = engine.engine.model.max_context - 2
    text = list(itertools.islice(itertools.cycle(prompts[-1]), 16 * longest))
    # Together they are longer than any step, so some are split.
    windows = [text[start : start + longest] for start in range(0, len(text), longest)]
    config = engine.engine.vllm_config.scheduler_config
    assert sum(map(len, windows)) > config.max_num_batched_tokens > longest
    sums = engine.run(engine.engine.measure_importance(windows, lambda *_: None))
    assert [each.num_tokens for each in sums] == list(map(len, windows))
    assert [each.num_texts for each in sums] == [1] * len(windows)
    reference.check_dense_pass(dense_pass(sums[:4]), dense, windows[:4])


def test_a_measurement_ends_when_it_is_told_to(
    engine: RunningEngine, prompts: list[list[int]]
) -> None:
    windows = [prompts[number % len(prompts)] for number in range(40)]
    seen: list[int] = []
    progress: list[tuple[int, int]] = []

    async def is_enough(sums: Sequence[DensePassSums]) -> bool:
        seen.append(len(sums))
        return len(sums) >= 32

    sums = engine.run(
        engine.engine.measure_importance(windows, lambda *c: progress.append(c), is_enough)
    )
    assert seen == [16, 32]
    assert [each.num_tokens for each in sums] == list(map(len, windows[:32]))
    assert progress[-1] == (sum(map(len, windows)),) * 2
    # Nothing of it is left for the next one.
    again = engine.run(engine.engine.measure_importance(windows[:3], lambda *_: None))
    assert [each.num_tokens for each in again] == list(map(len, windows[:3]))


def test_quality_is_that_of_transformers(
    engine: RunningEngine, dense: Any, prompts: list[list[int]]
) -> None:
    windows = [prompt * 3 for prompt in prompts[2:]]
    selections = [selection(5, 5), selection(3, 3), selection(2, 5), selection(5, 3)]
    measured = engine.run(engine.engine.measure_quality(windows, selections, lambda *_: None))
    for layers, quality in zip(selections, measured, strict=True):
        sums = []
        for window in windows:
            half = len(window) // 2
            logits, reference_logits = (
                reference.logits_with_skips(dense, window, half, chosen)[half - 1 : -1]
                for chosen in (layers, LayerSelection())
            )
            targets = torch.tensor(window[half:])
            sums.append(token_statistics(logits, reference_logits, targets).tolist())
        expected = quality_of_windows(sums)
        assert quality.num_tokens == expected.num_tokens
        assert quality.agreement == expected.agreement
        assert quality.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert quality.perplexity_stderr == pytest.approx(expected.perplexity_stderr, rel=1e-3)
        assert quality.kl_nats == pytest.approx(expected.kl_nats, rel=1e-3, abs=1e-6)
    assert measured[0].agreement == 1.0


def test_engine_is_idle_when_all_have_ended(engine: RunningEngine) -> None:
    assert engine.engine.is_alive
    assert engine.engine.load() == LoadInfo(0, 0)
