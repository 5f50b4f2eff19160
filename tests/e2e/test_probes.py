"""What a level writes and how it chooses, and what automatic depth makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from server.rpc.client import Client
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2
from tests.e2e.calls import greedy_request
from tests.e2e.running_server import RunningServer, until

AUTO = common_pb2.Depth(auto=common_pb2.Auto())
DEGRADED = common_pb2.Served.REASON_DEGRADED


def test_every_level_is_probed(demo_server: RunningServer, demo_client: Client) -> None:
    levels = {level.decode_layers: level for level in demo_client.get_model().levels}
    dense = levels[16]
    assert (dense.writing.ratio, dense.writing.first_token_changed) == (1.0, 0.0)
    assert dense.writing.repeated_share == dense.writing.dense_repeated_share
    assert dense.choosing.agreement == 1.0
    assert dense.choosing.accuracy > 0.4, "guessing gets 0.25"
    for level in levels.values():
        assert level.writing.ratio == pytest.approx(
            level.writing.perplexity / level.writing.dense_perplexity
        )
        assert level.writing.dense_perplexity == dense.writing.perplexity
        assert level.writing.num_tokens == level.writing.num_prompts * 48
        assert 16 <= level.choosing.num_items <= 64
        assert 0 < level.choosing.accuracy_stderr < 0.15
    # A quarter of the layers writes what the dense model finds much less likely.
    shallowest = levels[min(levels)]
    assert shallowest.writing.ratio > 2
    assert shallowest.writing.first_token_changed > 0.2
    assert shallowest.choosing.agreement < 1

    shown = demo_server.scrape().by_label("fathom_level_writing_perplexity_ratio", "level")
    assert shown == {
        level.name: pytest.approx(level.writing.ratio, rel=1e-12) for level in levels.values()
    }


@contextmanager
def overloaded(client: Client, policy: control_pb2.Policy) -> Iterator[None]:
    """Set the rules so that any load is too much; set them back in the end."""
    before = client.get_status().policy
    del before.ladder[:]
    policy.time_to_first_token_seconds = 1e-6
    policy.hold_seconds = 3600
    try:
        client.set_policy(control_pb2.SetPolicyRequest(policy=policy))
        yield
    finally:
        client.set_policy(control_pb2.SetPolicyRequest(policy=before))


def test_score_goes_where_generate_may_not(demo_server: RunningServer, demo_client: Client) -> None:
    model = demo_client.get_model()
    writes_well, *others = sorted(
        (level for level in model.levels if level.decode_layers < model.num_layers),
        key=lambda level: level.writing.ratio,
    )
    limit = writes_well.writing.ratio - 1
    assert others[0].writing.ratio - 1 > limit
    chooses_well = min(others, key=lambda level: level.decode_layers)
    score = inference_pb2.ScoreRequest(text="Return a list of the names", depth=AUTO)
    generate = greedy_request("Return the", 4)
    generate.depth.CopyFrom(AUTO)
    policy = control_pb2.Policy(
        level=next(each.name for each in model.levels if each.decode_layers == model.num_layers),
        max_quality_loss=1e6,
        max_writing_loss=limit,
        max_repetition=1.0,
        max_choosing_loss=0.99,
    )
    with overloaded(demo_client, policy):
        status = demo_client.get_status()
        assert list(status.policy.ladder) == [policy.level, writes_well.name]
        assert set(status.policy.score_ladder) == {level.name for level in model.levels}

        def is_at_the_bottom() -> bool:
            demo_client.score(score)
            demo_client.generate(generate)
            return demo_client.get_status().auto_score_level == chooses_well.name

        until(is_at_the_bottom, lambda: demo_server.log)
        assert demo_client.get_status().auto_level == writes_well.name
        served = demo_client.score(score).served
        assert (served.decode_layers, served.reason) == (chooses_well.decode_layers, DEGRADED)
        served = demo_client.generate(generate).served
        assert (served.decode_layers, served.reason) == (writes_well.decode_layers, DEGRADED)
        scrape = demo_server.scrape()
        assert scrape.sum("fathom_policy_level", level=writes_well.name) == 1
        assert scrape.sum("fathom_policy_score_level", level=chooses_well.name) == 1
        assert scrape.value("fathom_policy_degraded") == 1
    status = demo_client.get_status()
    assert (status.auto_level, status.auto_score_level) == (policy.level, policy.level)


def test_the_defaults_keep_generate_from_what_writes_badly(demo_client: Client) -> None:
    model, status = demo_client.get_model(), demo_client.get_status()
    rules = status.policy
    assert (rules.max_writing_loss, rules.max_repetition) == (0.5, 0.2)
    assert rules.max_choosing_loss == 0.15
    levels = {level.name: level for level in model.levels}
    for name in rules.ladder:
        writing = levels[name].writing
        assert writing.ratio - 1 <= 0.5
        assert writing.repeated_share - writing.dense_repeated_share <= 0.2
    dense = max(levels.values(), key=lambda level: level.decode_layers)
    for name in rules.score_ladder:
        assert dense.choosing.accuracy - levels[name].choosing.accuracy <= 0.15
