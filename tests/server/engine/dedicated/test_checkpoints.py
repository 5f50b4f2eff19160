"""Exported checkpoints are kept, shared, and made anew where they cannot be trusted."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pruning.fingerprint import model_fingerprint
from pruning.plan import Plan
from pruning.surgery import count_layers
from server.engine.dedicated.checkpoints import CheckpointStore
from server.errors import FailedPrecondition

ORDER = (2, 3, 1, 4, 0)


def plan_of(model: Path) -> Plan:
    return Plan(
        removal_order=ORDER,
        scores=(0.5,) * len(ORDER),
        stderrs=(0.1,) * len(ORDER),
        model_fingerprint=model_fingerprint(model),
        text_fingerprint="sha256:t",
        num_tokens=10,
        versions={},
        created_at=0.0,
    )


def store(model: Path, state: Path) -> CheckpointStore:
    return CheckpointStore(state, model, "stories", model_fingerprint(model), with_code=False)


async def test_an_export_is_made_once(stories_model: Path, tmp_path: Path) -> None:
    plan = plan_of(stories_model)
    path = await store(stories_model, tmp_path / "state").checkpoint(plan, (2, 3))
    assert count_layers(path) == 3
    made = (path / "config.json").stat().st_mtime_ns
    again = await store(stories_model, tmp_path / "state").checkpoint(plan, (2, 3))
    assert again == path
    assert (path / "config.json").stat().st_mtime_ns == made
    other = await store(stories_model, tmp_path / "state").checkpoint(plan, (1, 2, 3))
    assert count_layers(other) == 2
    assert other != path


async def test_dense_is_the_model_itself(stories_model: Path, tmp_path: Path) -> None:
    path = await store(stories_model, tmp_path).checkpoint(plan_of(stories_model), ())
    assert path == stories_model
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "changed", "unfinished", "no plan"])
async def test_what_is_damaged_is_reported_and_made_anew(
    stories_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    plan = plan_of(stories_model)
    path = await store(stories_model, tmp_path).checkpoint(plan, (2, 3))
    whole = model_fingerprint(path)
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    match damage:
        case "truncated":
            weights.write_bytes(content[: len(content) // 2])
        case "changed":
            content[-1] ^= 1
            weights.write_bytes(content)
        case "unfinished":
            path.with_suffix(".json").unlink()
        case "no plan":
            (path / "fathom_plan.json").unlink()
            weights.unlink()
    with caplog.at_level(logging.WARNING):
        assert await store(stories_model, tmp_path).checkpoint(plan, (2, 3)) == path
    assert model_fingerprint(path) == whole
    reports = [r for r in caplog.records if "will be made anew" in r.getMessage()]
    assert len(reports) == (0 if damage == "unfinished" else 1)


async def test_no_place_for_it_is_said(stories_model: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("not a directory")
    with pytest.raises(FailedPrecondition, match="checkpoint of depth 3 cannot be made"):
        await store(stories_model, tmp_path / "state").checkpoint(plan_of(stories_model), (2, 3))
