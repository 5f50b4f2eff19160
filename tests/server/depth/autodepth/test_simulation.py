"""Hours of traffic on an engine with recorded step times: depth follows load."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.plan import Plan
from pruning.quality import Quality
from server.depth.auto_rules import AutoRules, ladder
from server.depth.autodepth import AutoDepth
from server.depth.levels import DepthPair, Level, default_levels
from server.depth.measured import Measured, Speed
from server.depth.policy import DepthPolicy
from tests.server.depth.autodepth.engine_model import EngineModel, Request, StepTimes, arrivals

TIMES = StepTimes()
NUM_PLACES = 32
NUM_TOKENS = 64
HOLD_SECONDS = 30.0
# Perplexities of the demo model by depth.
PERPLEXITIES = {16: 19.7, 12: 22.6, 8: 29.7, 4: 77.9}
LOSSES = {depth: value / PERPLEXITIES[16] - 1 for depth, value in PERPLEXITIES.items()}
LOOK_SECONDS = 0.5


def policy() -> DepthPolicy:
    plan = Plan(
        removal_order=tuple(range(16)),
        scores=(0.5,) * 16,
        stderrs=(0.1,) * 16,
        model_fingerprint="sha256:m",
        text_fingerprint="sha256:t",
        num_tokens=10,
        versions={},
        created_at=0.0,
    )
    dense = TIMES.uniform(16, 8)
    return DepthPolicy(
        plan,
        default_levels(16),
        measured=Measured(
            {
                DepthPair(d, d): Quality(p, 0.1, 1 - LOSSES[d] / 10, 0.1, 100)
                for d, p in PERPLEXITIES.items()
            },
            {DepthPair(d, d): Speed(1.0, dense / TIMES.uniform(d, 8), 8) for d in PERPLEXITIES},
        ),
    )


def capacity(depth: int) -> float:
    """Return how many requests per second the engine finishes at most, all of one depth."""
    seconds = TIMES.uniform(depth, NUM_PLACES) * NUM_TOKENS
    seconds += NUM_PLACES * TIMES.prompt(depth, 64)
    return NUM_PLACES / seconds


@dataclass
class Day:
    """What happened: (when, rung) of each change, and the requests."""

    changes: list[tuple[float, int]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    rungs_seen: set[int] = field(default_factory=set)
    last_rung: int = 0


def live(
    requests: Iterable[Request],
    rules: AutoRules,
    seconds: float,
    *,
    automatic: bool = True,
) -> Day:
    """Serve the requests for ``seconds``, with a look at the load every half a second."""
    now = 0.0
    auto = AutoDepth(rules, clock=lambda: now)
    present = policy()
    day = Day()

    def depth_of(request: Request) -> int:
        return present.level(present.present_level).decode_layers if automatic else 16

    engine = EngineModel(
        TIMES,
        NUM_PLACES,
        depth_of,
        on_first_token=lambda seconds: auto.observe(seconds, None),
        on_gaps=auto.observe,
    )
    incoming = iter(requests)
    upcoming = next(incoming, None)
    next_look = LOOK_SECONDS
    while now < seconds:
        while upcoming is not None and upcoming.arrived <= engine.now:
            auto.observe_arrival()
            engine.waiting.append(upcoming)
            upcoming = next(incoming, None)
        if engine.num_running or engine.waiting:
            engine.step()
        else:
            engine.now = min(upcoming.arrived if upcoming else seconds, next_look)
        now = engine.now
        if now >= next_look:
            next_look = now + LOOK_SECONDS
            rung = auto.rung
            levels = auto.choose(
                present,
                num_waiting=len(engine.waiting),
                longest_wait=engine.longest_wait(),
                utilization=engine.utilization,
            )
            present = present.with_present_level(levels.generate.name, levels.score.name)
            if auto.rung != rung:
                day.changes.append((now, auto.rung))
            day.rungs_seen.add(auto.rung)
    day.last_rung = auto.rung
    day.requests = engine.finished
    return day


def goodput(day: Day, rules: AutoRules) -> float:
    """Return the share of requests that met both targets."""
    good = [
        r
        for r in day.requests
        if r.first_token - r.arrived <= rules.time_to_first_token
        and (r.finished - r.first_token) / (r.num_tokens - 1) <= rules.inter_token_latency
    ]
    return len(good) / len(day.requests)


def constant(load: float) -> Callable[[float], float]:
    return lambda _: load


def rules(**changes: object) -> AutoRules:
    values: dict[str, object] = {
        "time_to_first_token": 0.5,
        "inter_token_latency": 2 * TIMES.uniform(16, NUM_PLACES),
        "max_quality_loss": 10.0,
        "hold_seconds": HOLD_SECONDS,
    }
    return AutoRules(**{**values, **changes})  # type: ignore[arg-type]


def test_without_load_nothing_is_given_up() -> None:
    rate = 0.5 * capacity(16)
    day = live(arrivals(constant(rate), 1800, 1, highest=rate), rules(), 1800)
    assert day.changes == []
    assert {request.depth for request in day.requests} == {16}
    assert goodput(day, rules()) > 0.99


def test_a_short_burst_of_twice_the_capacity() -> None:
    """Most of it is served within the targets; at full depth next to nothing is."""

    def burst() -> Iterable[Request]:
        rate = 2 * capacity(16)
        return arrivals(constant(rate), 10, 5, highest=rate)

    chosen = rules(time_to_first_token=1.0)
    fixed = live(burst(), chosen, 60, automatic=False)
    day = live(burst(), rules(), 60)
    assert len(day.requests) == len(fixed.requests)
    assert goodput(fixed, chosen) < 0.3
    assert goodput(day, chosen) > 0.9


def test_half_an_hour_with_a_rush_in_the_middle() -> None:
    """It reacts within seconds, keeps up, and comes back."""

    def rate(now: float) -> float:
        return 1.5 * capacity(16) if 300 <= now < 700 else 0.4 * capacity(16)

    def rush() -> Iterable[Request]:
        return arrivals(rate, 1800, 2, highest=1.5 * capacity(16))

    day = live(rush(), rules(), 1800)
    first_change, _ = day.changes[0]
    assert 300 < first_change < 310
    assert day.last_rung == 0
    assert max(when for when, _ in day.changes) < 700 + 3 * (HOLD_SECONDS + 5)
    fixed = live(rush(), rules(), 1800, automatic=False)
    in_rush = [r for r in day.requests if 320 < r.arrived < 700]
    late = [r for r in in_rush if r.first_token - r.arrived > 0.5]
    assert len(late) < 0.2 * len(in_rush)
    assert goodput(day, rules()) > goodput(fixed, rules()) + 0.3


@pytest.mark.parametrize("load", [0.9, 1.05, 1.6])
def test_a_constant_load_leads_to_few_changes(load: float) -> None:
    """Two hours of it: the depth settles, and stays."""
    rate = load * capacity(16)
    day = live(arrivals(constant(rate), 7200, 3, highest=rate), rules(), 7200)
    assert len(day.changes) <= 6
    assert [when for when, _ in day.changes if when > 3600] == []
    assert goodput(day, rules()) > 0.95


@given(
    loads=st.lists(st.floats(0.0, 3.0), min_size=1, max_size=5),
    max_loss=st.sampled_from([0.0, 0.1, 0.2, 0.6, 10.0]),
    min_agreement=st.sampled_from([0.0, 0.95, 0.99]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15)
def test_any_traffic(loads: list[float], max_loss: float, min_agreement: float, seed: int) -> None:
    """Quality never falls below the floor, and without load it is all there again."""
    phase, calm = 90.0, 400.0
    busy = phase * len(loads)

    def rate(now: float) -> float:
        return loads[int(now / phase)] * capacity(16) if now < busy else 0.05

    chosen = rules(max_quality_loss=max_loss, min_agreement=min_agreement)
    highest = max(*loads, 0.1) * capacity(16)
    # What is left of a rush is still to be done, and then the hold may have doubled for each phase.
    seconds = busy * (1 + max(loads)) + calm + HOLD_SECONDS * 2 ** (len(loads) + 2)
    day = live(arrivals(rate, seconds, seed, highest=highest), chosen, seconds)
    allowed = {
        depth
        for depth, loss in LOSSES.items()
        if loss <= max_loss and 1 - loss / 10 >= min_agreement
    }
    assert {request.depth for request in day.requests} <= allowed | {16}
    assert day.last_rung == 0


def test_the_ladder_keeps_to_the_floor_and_to_the_operators_order() -> None:
    def names(rules: AutoRules, of: DepthPolicy | None = None) -> list[str]:
        return [level.name for level in ladder(of or policy(), rules)]

    assert names(rules()) == ["dense", "balanced", "fast", "turbo"]
    assert names(rules(max_quality_loss=0.2)) == ["dense", "balanced"]
    assert names(rules(min_agreement=0.9)) == ["dense", "balanced", "fast"]
    assert names(rules(max_quality_loss=0.0)) == ["dense"]
    assert names(rules(levels=("dense", "turbo", "fast"))) == ["dense", "turbo", "fast"]
    # What the operator has chosen for times without load is never refused.
    from_fast = policy().with_auto_level("fast")
    assert names(rules(max_quality_loss=0.0), from_fast) == ["fast"]
    assert names(rules(), from_fast) == ["fast", "turbo"]
    # Quality that is not known is not good enough; a level that is gone is not missed.
    unmeasured = DepthPolicy(policy().plan, default_levels(16))
    assert names(rules(), unmeasured) == ["dense"]
    fewer = policy().with_levels(default_levels(16)[:2], None)
    assert names(rules(levels=("dense", "turbo", "balanced")), fewer) == ["dense", "balanced"]


def test_levels_of_the_prompt_are_on_the_ladder_where_they_are_named() -> None:
    """Their measured speed, that of generated tokens, is no reason to choose them."""
    base = policy()
    levels = (*base.levels, Level("prompt", 4, 16))
    prompts = base.with_levels(levels, None).with_measured(
        Measured({DepthPair(4, 16): base.qualities[base.dense]})
    )
    default = [level.name for level in ladder(prompts, AutoRules(max_quality_loss=9.0))]
    assert default == ["dense", "balanced", "fast", "turbo"]
    rules = AutoRules(levels=("dense", "prompt", "fast"), max_quality_loss=9.0)
    assert [level.name for level in ladder(prompts, rules)] == ["dense", "prompt", "fast"]
