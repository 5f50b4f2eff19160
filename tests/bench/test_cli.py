from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from bench.cli import run

DEMO = ("--model", "demo")
TINY = (
    *("--layers", "4", "--hidden", "128", "--intermediate", "192", "--heads", "4"),
    *("--kv-heads", "2", "--vocabulary", "512", "--rounds", "2"),
)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["throughput", "--address", "127.0.0.1:9", "--depths", "0"], "UNAVAILABLE"),
        (["throughput", "--streams", "0"], "got '0'"),
        (["throughput", "--output-tokens", "few"], "allowed: 16, fixed:16"),
        (["throughput", "--rates", "-1"], "--rates"),
        (["peers", "--peers", "vllm,nobody"], "got 'nobody'"),
        (["peers", *TINY, "--depths", "5"], "allowed: at most 4"),
        (["http", "--servers", "http,nobody"], "got 'nobody'"),
        (["http", "--servers", "http"], "allowed: two or three"),
        (["mixed", "--streams", "3"], "an even number"),
        (["mixed", *TINY, "--depth", "4"], "allowed: 1 to 3"),
        (["calibration", "--tokens", "1"], "allowed: 2 or more"),
        (["startup", "--model", "./nowhere"], "--model: got './nowhere'"),
        (["throughput", "--model", "tests"], "--model: got 'tests'"),
        (["profile", "--engines", "other"], "got 'other'"),
        (["parallel", "--engines", "other"], "got 'other'"),
        (["parallel", "--ranks", "1"], "--ranks: allowed: 2 or more"),
        (["depth-quality", "--no-plain", "--no-repair", "--model", "demo"], "--no-plain: allowed"),
        (["depth-quality", "--metrics", "taylor"], "--metrics: got 'taylor'"),
        (["depth-quality", "--model", "./nowhere"], "model: got './nowhere'"),
        (["depth-quality", "--model", "demo", "--texts", "no.txt"], "no such"),
        (["depth-quality", "--questions", "no.jsonl", "--model", "demo"], "No such file"),
        (["repair", *TINY, "--depths", "5"], "allowed: at most 4"),
        (["repair", "--streams", "0"], "got '0'"),
        (["export-methods", "--model", "demo", "--depths", "16"], "allowed: less than 16"),
        (["export-methods", "--model", "./nowhere"], "model: got './nowhere'"),
        (["export-methods", "--calibration-tokens", "0"], "--calibration-tokens: allowed"),
        (
            ["export-methods", *DEMO, "--calibration-tokens", "256", "--text-tokens", "64"],
            "allowed: 2 or more, for a standard error",
        ),
        (["healing-kinds", "--model", "demo", "--depths", "16"], "allowed: less than 16"),
        (["healing-kinds", "--steps", "0"], "--steps: allowed: 1 or more"),
        (["healing-kinds", "--intermediate-size", "-1"], "--intermediate-size: allowed: 0"),
        (["norms", "--steps", "0"], "--steps: allowed: 1 or more"),
        (["norms", "--layers", "1"], "--layers: got 1, allowed: 2 or more"),
        (["norms", "--hidden", "130"], "a multiple of --heads 4"),
        (["norms", "--window", "1"], "--window: got 1"),
        (["norms", "--learning-rate", "0"], "--learning-rate: got 0.0"),
        (["fleet"], "--trace: got nothing"),
        (["fleet", "--trace", "nowhere.csv"], "No such file"),
        (["fleet", "--trace", str(Path(__file__))], "is no such file"),
        (["fleet", "--load", "0"], "--load"),
        (["throughput", *TINY, "--vocabulary", "3"], "vocab_size: got 3"),
        (["throughput", *TINY, "--max-context", "64", "--prompt-tokens", "60"], "up to 124"),
        (["throughput", "--rounds", "0"], "--rounds"),
        (["nothing"], "No such command"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as raised:
        run(arguments)
    assert raised.value.code in (1, 2)
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "bench-results").exists()


def test_matplotlib_is_asked_for_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as raised:
        run(["startup", "--work-dir", "work"])
    assert raised.value.code == 1
    assert "fathom-server[bench]" in capsys.readouterr().err
