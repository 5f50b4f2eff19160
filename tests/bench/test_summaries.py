"""Summaries that the benchmarks make of given rounds."""

from __future__ import annotations

import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bench import parallel, peers, profile, throughput
from bench.load import Load, Timeline, closed_loop
from bench.machine import ForeignLoad
from bench.options import Options
from bench.report import Report
from bench.session import Session
from bench.workload import Request


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session("test", Options(output=str(tmp_path)), {"name": "m"})


def measured(tokens_per_second: float, **labels: Any) -> dict[str, Any]:
    latency = {"p50": 1.0, "p95": 2.0, "p99": 3.0}
    return {
        "tokens_per_second": tokens_per_second,
        "time_to_first_token": latency,
        "inter_token_latency": latency,
        **labels,
    }


def test_a_depth_at_its_limit_reaches_its_target(session: Session) -> None:
    """In the second round the machine has half its pace."""
    for number, pace in enumerate((1.0, 0.5)):
        for depth, seconds in ((16, 20.0), (8, 12.0), (4, 8.0), (2, 2 * 6.0)):
            speed = 1000 * pace / seconds
            session.report.rounds.append(measured(speed, streams=8, depth=depth, round=number))
    throughput.summarize(session, "streams", 8, (16, 8, 4), 16)
    rows = {row["depth"]: row for row in session.report.summary}
    assert rows[8]["of_full_depth"] == pytest.approx(20 / 12)
    assert rows[8]["layer_share"] == pytest.approx(16 / 20)
    assert rows[8]["of_limit"] == pytest.approx(1.0)
    assert rows[8]["layers_alone"] == 2.0
    assert rows[16]["itl_p95_ms"] == 2000.0
    assert all(target.holds for target in session.report.targets)

    session.report.targets.clear()
    throughput.summarize(session, "streams", 8, (16, 8, 4, 2), 16)
    held = {target.name: target.holds for target in session.report.targets}
    assert not held["8 streams, depth 2, of the limit"]


def test_targets_of_peers(session: Session) -> None:
    seconds = {
        ("elastic", 16): 20.0,
        ("elastic", 8): 12.6,
        ("vllm", 16): 20.0,
        ("vllm", 8): 12.0,
        ("grpc", 16): 25.0,
    }
    speeds = {key: [1000 / value] * 2 for key, value in seconds.items()}
    for kind, p50 in (("elastic", 0.010), ("grpc", 0.0105)):
        for number in range(2):
            each = measured(1.0, streams=4, peer=kind, depth=16, round=number)
            session.report.rounds.append({**each, "inter_token_latency": {"p50": p50}})
    found = {t.name: t for t in peers.targets(session, 4, speeds, 16)}
    assert {name: (t.holds, t.bound) for name, t in found.items()} == {
        "4 streams: Fathom depth 16 / vLLM dense": (True, 0.98),
        "4 streams: Fathom depth 8 / vLLM exported depth 8": (False, 0.97),
        "4 streams: Fathom depth 8 / depth 16, of the limit": (True, 0.95),
        "4 streams: gRPC / in process": (False, 0.95),
        "4 streams: added by gRPC to the median inter-token latency": (True, 1.0),
    }
    of_limit = found["4 streams: Fathom depth 8 / depth 16, of the limit"]
    assert of_limit.value == pytest.approx((20 / 12.6) / (20 / 12))
    added = found["4 streams: added by gRPC to the median inter-token latency"]
    assert added.value == pytest.approx(0.5)


def test_the_parts_of_a_step_are_a_table_of_parts_by_loads(session: Session) -> None:
    for engine, layers in (("Fathom", 6.0), ("vLLM", 4.0)):
        session.report.rounds.append(
            {
                "engine": engine,
                "load": "depth 8",
                "seconds": 10.0,
                "num_steps": 100,
                "seconds_by_part": {"sampling": 1.0, "layers": layers},
                "cpu_seconds_beside": {"front: other": 0.5},
                "missing": [],
            }
        )
    profile.summarize(session)
    table = {row["ms_per_step"]: row["Fathom, depth 8"] for row in session.report.summary}
    assert list(table.items()) == [
        ("whole step", 100.0),
        ("share of the layers", 0.6),
        ("layers", 60.0),
        ("sampling", 10.0),
        ("beside: front: other", 5.0),
    ]
    assert session.report.summary[2]["vLLM, depth 8"] == 40.0
    assert session.report.notes == []


async def test_a_round_keeps_what_was_measured_and_who_used_the_processor(
    session: Session, tmp_path: Path
) -> None:
    async def generate(request: Request) -> AsyncIterator[int]:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        yield request.num_tokens

    with subprocess.Popen(["sleep", "60"]) as waiting:
        try:
            load = await session.measure(
                lambda: closed_loop(generate, [[Request((1,), 3)]]), depth=2
            )
        finally:
            waiting.kill()
    (each,) = session.report.rounds
    assert (each["depth"], each["num_tokens"], each["seconds"]) == (2, 3, load.seconds)
    assert each["client_cpu_seconds"] > 0.05
    assert each["cpu_seconds"] == 0.0
    assert each["waiting_cpu_seconds"] <= 0.02
    assert 0.0 <= each["foreign_load"] <= 1.0
    session.finish(lambda stem: stem.with_suffix(".txt").write_text("plot"))
    assert {path.name for path in tmp_path.iterdir()} == {"test.json", "test.txt"}


def test_what_disturbed_a_measurement_is_said(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    session.report.rounds.append(
        {"seconds": 10.0, "waiting_cpu_seconds": 5.0, "foreign_load": 0.25}
    )
    session.finish(lambda stem: None)
    printed = capsys.readouterr().out
    assert "Other programs took up to 25% of the machine" in printed
    assert "Engines that only waited for their turn used up to 50% of a core" in printed


async def test_a_disturbed_load_is_run_again_and_the_calmest_run_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.6, 0.3, 0.05, 0.5, 0.4, 0.3, 0.7])
    monkeypatch.setattr(ForeignLoad, "share", lambda self: next(shares))
    session = Session("test", Options(output=str(tmp_path)), {"name": "m"})
    sizes = iter(range(1, 8))

    async def work() -> Load:
        return Load((Timeline(0.0, [(0.5, next(sizes))]),), 0.0, 1.0)

    assert (await session.measure(work, name="calm in the end")).num_tokens == 3
    assert (await session.measure(work, name="never calm")).num_tokens == 6
    kept = [(r["num_tokens"], r["foreign_load"], r["attempts"]) for r in session.report.rounds]
    assert kept == [(3, 0.05, 3), (6, 0.3, 4)]


async def test_a_run_that_is_cut_off_leaves_its_rounds_behind(tmp_path: Path) -> None:
    session = Session("test", Options(output=str(tmp_path)), {"name": "m"})

    async def work() -> Load:
        return Load((Timeline(0.0, [(0.5, 7)]),), 0.0, 1.0)

    for number in range(2):
        await session.measure(work, repeatable=False, round=number)
        kept = Report.model_validate_json((tmp_path / "test.json").read_text())
        assert kept.rounds == session.report.rounds
        assert [each["num_tokens"] for each in kept.rounds] == [7] * (number + 1)


def test_ranks_are_compared_with_one_process_in_the_same_round(session: Session) -> None:
    """In the second round the machine has half its pace, and of two ranks one waits in sums."""
    for number, pace in enumerate((1.0, 0.5)):
        for way, speed in (("one process", 80.0), ("tensor parallel 2", 60.0)):
            labels = {"engine": "elastic", "way": way, "round": number}
            session.report.rounds.append({**labels, "event": "start", "start_seconds": 9 / pace})
            row = measured(pace * speed, **labels, depth=8, streams=4)
            session.report.rounds.append(row)
    session.report.rounds.append(
        {
            "communication_of": ("elastic", "tensor parallel 2"),
            "depth": 8,
            "streams": 4,
            "seconds": 10.0,
            "communication_seconds": [6.0, 2.5],
            "calls_per_step": 17.0,
        }
    )
    # The pipeline could not be started.
    ways = [("elastic", way) for way in ("one process", "tensor parallel 2", "pipeline 2")]
    parallel.summarize(session, ways, [8], [4])
    one, two = session.report.summary
    assert one["of_one_process"] == 1.0
    assert one["communication"] is None
    assert two["of_one_process"] == pytest.approx(0.75)
    assert two["start_s"] == pytest.approx(13.5)
    assert (two["communication"], two["calls_per_step"]) == ("25%", 17.0)
