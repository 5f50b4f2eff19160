from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pruning.importance import BlockInfluence
from pruning.metrics import Ranking
from pruning.metrics.names import BLOCK_INFLUENCE, METRIC_NAMES
from pruning.plan import Plan, PlanError

finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(codec="utf-8"), min_size=1)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    num_layers = draw(st.integers(1, 40))
    scores = st.lists(finite, min_size=num_layers, max_size=num_layers).map(tuple)
    others = draw(st.dictionaries(st.sampled_from(METRIC_NAMES[1:]), scores))
    return Plan(
        removal_order=tuple(draw(st.permutations(range(num_layers)))),
        scores=draw(scores),
        stderrs=tuple(map(abs, draw(st.lists(finite, min_size=num_layers, max_size=num_layers)))),
        model_fingerprint=draw(words),
        text_fingerprint=draw(words),
        num_tokens=draw(st.integers(1, 2**53)),
        versions=draw(st.dictionaries(words, words)),
        created_at=draw(finite),
        metric=draw(st.sampled_from([BLOCK_INFLUENCE, *others])),
        other_scores=others,
    )


@pytest.fixture
def plan() -> Plan:
    return Plan.from_importance(
        BlockInfluence(scores=(0.3, 0.1, 0.2), stderrs=(0.01, 0.02, 0.03), num_tokens=1000),
        model_fingerprint="sha256:aa",
        text_fingerprint="sha256:bb",
        versions={"torch": "2.13.0"},
    )


@given(plans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_leaves_out_the_least_important_first(plan: Plan) -> None:
    assert plan.removal_order == (1, 2, 0)
    assert plan.num_layers == 3
    assert [plan.skipped(depth) for depth in (3, 2, 1)] == [(), (1,), (1, 2)]
    with pytest.raises(ValueError, match="depth: got 4, allowed: 1 to 3"):
        plan.skipped(4)


def test_is_readable_json(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["format_version"] == 2
    assert document["metric"] == "block_influence"
    assert document["removal_order"] == [1, 2, 0]


def test_another_metric_brings_its_order_and_keeps_every_score(plan: Plan, tmp_path: Path) -> None:
    by_norm = plan.ranked_by("norm", Ranking((2, 1, 0), (-1.0, -2.0, -3.0)))
    greedy = by_norm.ranked_by("greedy_kl", Ranking((1, 0, 2), (0.2, 0.1, 0.7)))
    assert (greedy.metric, greedy.removal_order) == ("greedy_kl", (1, 0, 2))
    assert greedy.scores == plan.scores, "block influence"
    assert greedy.other_scores == {"norm": (-1.0, -2.0, -3.0), "greedy_kl": (0.2, 0.1, 0.7)}
    again = greedy.ranked_by("block_influence", Ranking(plan.removal_order, plan.scores))
    assert replace(again, other_scores={}) == plan
    greedy.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == greedy


def test_version_1_is_still_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    document = {
        "removal_order": [1, 2, 0],
        "scores": [0.3, 0.1, 0.2],
        "stderrs": [0.01, 0.02, 0.03],
        "model_fingerprint": "sha256:aa",
        "text_fingerprint": "sha256:bb",
        "num_tokens": 1000,
        "versions": {"torch": "2.13.0"},
        "created_at": 1.5,
        "metric": "block_influence",
        "format_version": 1,
    }
    path.write_text(json.dumps(document))
    plan = Plan.load(path)
    assert (plan.removal_order, plan.scores, plan.created_at) == ((1, 2, 0), (0.3, 0.1, 0.2), 1.5)
    assert (plan.metric, plan.other_scores) == ("block_influence", {})
    plan.save(path)
    assert json.loads(path.read_text())["format_version"] == 2
    assert Plan.load(path) == plan


def test_a_reader_never_sees_a_part(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_text()
    with path.open() as reader:
        replace(plan, num_tokens=7).save(path)
        assert reader.read() == before
    assert Plan.load(path).num_tokens == 7


def test_a_failed_save_leaves_the_old_plan(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    broken = replace(plan, versions={"torch": object()})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        broken.save(path)
    assert Plan.load(path) == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_every_truncation_is_refused(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    data = path.read_bytes().rstrip()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(PlanError, match=r"plan\.json: not a complete JSON document"):
            Plan.load(path)


REMOVED = object()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 3, "format_version: found 3, allowed: 1 or 2"),
        ("format_version", "1", "format_version: found '1', allowed: 1 or 2"),
        ("format_version", True, "format_version: found True, allowed: 1 or 2"),
        ("format_version", REMOVED, "format_version: found None, allowed: 1 or 2"),
        ("format_version", 1, "other_scores: unknown, allowed: created_at, "),
        ("metric", "taylor", "metric: found 'taylor', allowed: one of block_influence, relative_"),
        ("metric", "norm", "other_scores.norm: found None, allowed: the scores of the plan's"),
        ("other_scores", REMOVED, "other_scores: found nothing, allowed: a value"),
        ("other_scores", [], "other_scores: found [], allowed: an object of lists of numbers"),
        ("other_scores", {"norm": 1}, "other_scores.norm: found 1, allowed: a list of numbers"),
        ("other_scores", {"norm": [1, 2]}, "other_scores.norm: found (1.0, 2.0), allowed: 3 num"),
        ("other_scores", {"norm": [1, 2, math.inf]}, "other_scores.norm: found (1.0, 2.0, inf),"),
        (
            "other_scores",
            {"taylor": [1, 2, 3]},
            "other_scores: found 'taylor', allowed: scores of relative_magnitude, norm, ",
        ),
        (
            "other_scores",
            {"block_influence": [1, 2, 3]},
            "other_scores: found 'block_influence', allowed: scores of relative_magnitude, ",
        ),
        ("metric", REMOVED, "metric: found nothing, allowed: a value"),
        ("colour", "red", "colour: unknown, allowed: created_at, "),
        ("removal_order", [0, 1, 1], "removal_order: got layer 1 more than once"),
        ("removal_order", [0, 1, 3], "removal_order: got layer 3, allowed: each of the layers"),
        ("removal_order", [], "removal_order: got 0 layers"),
        ("removal_order", [0, 1], "scores: found (0.3, 0.1, 0.2), allowed: 2 numbers"),
        ("removal_order", [0, 1, 2.0], "removal_order: found [0, 1, 2.0], allowed: a list of"),
        ("removal_order", "012", "removal_order: found '012', allowed: a list of integers"),
        ("scores", [0.1, math.nan, 0.2], "scores: found (0.1, nan, 0.2), allowed: finite"),
        ("scores", [0.1, math.inf, 0.2], "scores: found (0.1, inf, 0.2), allowed: finite"),
        ("scores", [0.1, 10**400, 0.2], "scores: found [0.1, 1"),
        ("scores", [0.1, None, 0.2], "scores: found [0.1, None, 0.2], allowed: a list of numbers"),
        ("scores", 0.1, "scores: found 0.1, allowed: a list of numbers"),
        ("stderrs", [0.1, 0.2], "stderrs: found (0.1, 0.2), allowed: 3 numbers"),
        ("stderrs", [0.1, -0.2, 0.3], "stderrs: found (0.1, -0.2, 0.3), allowed: finite"),
        ("stderrs", [0.1, math.nan, 0.3], "stderrs: found (0.1, nan, 0.3), allowed: finite"),
        ("model_fingerprint", "", "model_fingerprint: found '', allowed: a fingerprint"),
        ("model_fingerprint", None, "model_fingerprint: found None, allowed: a string"),
        ("text_fingerprint", "", "text_fingerprint: found '', allowed: a fingerprint"),
        ("num_tokens", 0, "num_tokens: found 0, allowed: 1 or more"),
        ("num_tokens", math.nan, "num_tokens: found nan, allowed: an integer"),
        ("created_at", math.inf, "created_at: found inf, allowed: seconds"),
        ("created_at", "today", "created_at: found 'today', allowed: a number"),
        ("versions", {"torch": 2}, "versions: found {'torch': 2}, allowed: an object of strings"),
        ("versions", [], "versions: found [], allowed: an object of strings"),
    ],
)
def test_damage_is_named(plan: Plan, tmp_path: Path, field: str, value: Any, message: str) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    document = json.loads(path.read_text())
    if value is REMOVED:
        del document[field]
    else:
        document[field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=re.escape(f"{path}: {message}")):
        Plan.load(path)


def test_other_documents_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for data, message in [
        (b"[1, 2]", "found [1, 2], allowed: a JSON object"),
        (b"\xff\xfe\x00", "not a complete JSON document"),
        (b"[" * 100_000, "not a complete JSON document"),
    ]:
        path.write_bytes(data)
        with pytest.raises(PlanError, match=re.escape(f"{path}: {message}")):
            Plan.load(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        Plan.load(tmp_path / "absent.json")


def test_refuses_another_model(plan: Plan) -> None:
    plan.check_model("sha256:aa", 3)
    with pytest.raises(PlanError, match="of the model sha256:aa, allowed: sha256:cc, this model"):
        plan.check_model("sha256:cc", 3)
    with pytest.raises(PlanError, match="of a model with 3 layers, allowed: 4"):
        plan.check_model("sha256:aa", 4)
