"""Benchmarks from the command line to the files, at tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.running_bench import bench
from tests.e2e.running_server import RunningServer

TINY = (
    *("--layers", "4", "--hidden", "128", "--intermediate", "192", "--heads", "4"),
    *("--kv-heads", "2", "--vocabulary", "512", "--rounds", "2"),
)


@pytest.mark.parametrize("load", ["--streams=1,2", "--rates=40"])
def test_throughput_of_a_server(load: str, demo_server: RunningServer, tmp_path: Path) -> None:
    report, output = bench(
        tmp_path,
        *("throughput", "--address", demo_server.address, load, "--rounds", "2"),
        *("--depths", "8,1", "--arrivals", "4", "--output-tokens", "list:4,6"),
    )
    kind, sizes = ("streams", {1, 2}) if "streams" in load else ("rate", {40.0})
    assert {(r[kind], r["depth"]) for r in report.summary} == {
        (size, depth) for size in sizes for depth in (16, 8, 1)
    }
    tokens = {r["num_tokens"] for r in report.rounds if r.get("streams") != 2}
    assert tokens == ({4} if kind == "streams" else {20})
    assert len(report.rounds) == 2 * len(report.summary)
    full = [r for r in report.summary if r["depth"] == 16]
    assert all(r["of_full_depth"] == 1.0 for r in full)
    assert all(r["itl_p50_ms"] > 0 for r in report.summary)
    # There is a target for every depth that a limit is known of.
    assert len(report.targets) == (4 if kind == "streams" else 0)
    assert all(target.name in output for target in report.targets)


def test_calibration(tmp_path: Path) -> None:
    report, output = bench(
        tmp_path, "calibration", *TINY, "--tokens", "1200", "--no-compile-layers"
    )
    assert [row["method"] for row in report.summary] == [
        "plain prefill",
        "all metrics of one pass, in the engine",
        "a pass of a search, in the engine",
        "Block Influence, output_hidden_states",
    ]
    assert {r["num_tokens"] for r in report.rounds} == {1200, 4800}
    assert len(report.targets) == 2
    assert "seconds per million tokens" in output.lower()


def test_stability(tmp_path: Path) -> None:
    report, output = bench(
        tmp_path,
        *("stability", "--model", "demo", "--texts", "documentation,random", "--tokens", "5120"),
        *("--metrics", "block_influence,angular_distance", "--no-compile-layers"),
    )
    for metric in ("block_influence", "angular_distance"):
        rows = [row for row in report.rounds if row["metric"] == metric]
        assert [row["text"] for row in rows if row["compared_with"] == "all of random"] == [
            *["random"] * 4,
            "documentation",
        ]
        for row in rows:
            assert sorted(row["order"]) == list(range(16))
            value, low, high = row["spearman"]
            assert -1 <= low <= high <= 1
            assert -1 <= value <= 1
        wholes = [row for row in rows if row["compared_with"] == f"all of {row['text']}"]
        last = {row["text"]: row for row in wholes}
        assert [row["spearman"][0] for row in last.values()] == [1.0, 1.0]
        assert all(0 <= row["settled"] <= 1 for row in last.values())
    assert "95 % of the resampled windows" in output


def test_fleet(demo_server: RunningServer, tmp_path: Path) -> None:
    """A load that rises to twice what the replicas carry at full depth, and falls again."""
    trace = tmp_path / "trace.csv"
    rows = [f"2026-01-01 00:{at // 60:02}:{at % 60:02}.0000000,10," for at in range(600)]
    tokens = [200 if 200 <= at < 400 else 50 for at in range(600)]
    lines = [f"{row}{count}" for row, count in zip(rows, tokens, strict=True)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    report, output = bench(
        tmp_path,
        *("fleet", "--address", demo_server.address, "--trace", str(trace)),
        *("--max-quality-loss", "9", "--start-seconds", "30", "--load", "0.9"),
    )
    rows_by_name = {row["strategy"]: row for row in report.summary}
    assert list(rows_by_name) == ["fixed", "replicas alone", "depth alone", "replicas and depth"]
    fixed, both = rows_by_name["fixed"], rows_by_name["replicas and depth"]
    assert fixed["mean_depth"] == rows_by_name["replicas alone"]["mean_depth"] == 16
    assert both["mean_depth"] < 16
    assert both["within_target"] > fixed["within_target"]
    assert "replicas and depth" in output
