"""No client's request changes what another gets, or tells what another has sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.engine.base import (
    CacheNamespace,
    GenerationRequest,
    LayerSelection,
    SamplingOptions,
)
from tests.conftest import data_path
from tests.server.engine.elastic.running_engine import RunningEngine, running_engine

# The layers that depth 8 of the demo model skips.
EIGHT = (3, 4, 5, 6, 10, 11, 12, 13)
ALL_BUT_ONE = tuple(range(1, 16))
ATTACKER, VICTIM = CacheNamespace("client", "attacker"), CacheNamespace("client", "victim")
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[RunningEngine]:
    with running_engine(demo_model) as running:
        yield running


@pytest.fixture(scope="module")
def ids(engine: RunningEngine) -> list[int]:
    return engine.engine.tokenize(data_path("text/austen-emma.txt").read_text("utf-8")[:60000])


@pytest.fixture
def prompt(ids: list[int], request: pytest.FixtureRequest) -> list[int]:
    """400 tokens that no other test sends."""
    start = 450 * _NUMBERS[request.function.__name__]
    return ids[start : start + 400]


_NUMBERS = {
    name: number
    for number, name in enumerate(
        (
            "test_request_id_like_a_list_of_layers_poisons_no_other_request",
            "test_request_id_used_twice_reads_no_keys_of_generated_tokens_as_those_of_a_prompt",
            "test_what_is_cached_of_one_client_is_not_told_to_another",
        )
    )
}


def generate(
    engine: RunningEngine,
    request_id: str,
    prompt: list[int],
    layers: LayerSelection,
    namespace: CacheNamespace | None,
) -> tuple[list[int], int]:
    """Return the generated tokens, and how many of the prompt's were in the cache."""

    async def run() -> tuple[list[int], int]:
        sampling = SamplingOptions(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        request = GenerationRequest(request_id, prompt, layers, sampling, namespace)
        deltas = [delta async for delta in engine.engine.generate(request)]
        tokens = [token_id for delta in deltas for token_id in delta.token_ids]
        return tokens, max(delta.num_cached_tokens for delta in deltas)

    return engine.run(run())


def test_request_id_like_a_list_of_layers_poisons_no_other_request(
    engine: RunningEngine, prompt: list[int]
) -> None:
    """Its prompt runs one layer, so its keys would be wrong for any other request."""
    uniform = LayerSelection(EIGHT, EIGHT)
    expected, _ = generate(engine, "undisturbed", prompt, uniform, None)
    listed = ",".join(map(str, EIGHT))
    for number, request_id in enumerate((listed, f"fathom-{listed}", str(EIGHT), "3")):
        generate(engine, request_id, prompt, LayerSelection(ALL_BUT_ONE, ()), ATTACKER)
        victim = CacheNamespace("client", f"victim-{number}")
        assert generate(engine, "victim", prompt, uniform, victim) == (expected, 0), request_id


def test_request_id_used_twice_reads_no_keys_of_generated_tokens_as_those_of_a_prompt(
    engine: RunningEngine, prompt: list[int]
) -> None:
    layers = LayerSelection(EIGHT, ())
    first, _ = generate(engine, "turn", prompt[:250], layers, VICTIM)
    second = prompt[:250] + list(itertools.islice(itertools.cycle(first), 60))
    expected, _ = generate(engine, "undisturbed", second, layers, None)
    assert generate(engine, "turn", second, layers, VICTIM) == (expected, 0)


def test_what_is_cached_of_one_client_is_not_told_to_another(
    engine: RunningEngine, prompt: list[int]
) -> None:
    layers = LayerSelection(EIGHT, EIGHT)
    address = CacheNamespace("address", VICTIM.name)
    expected, num_cached = generate(engine, "first", prompt, layers, VICTIM)
    assert num_cached == 0
    for other in (ATTACKER, address, None):
        assert generate(engine, "probe", prompt, layers, other) == (expected, 0)
    again, num_cached = generate(engine, "again", prompt, layers, VICTIM)
    assert again == expected
    assert num_cached >= 256, "its own is still there"
