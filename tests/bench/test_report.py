from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from bench.plots import save_bars, save_lines
from bench.report import Report, Target
from bench.statistics import Spread


def test_a_target_says_whether_it_holds() -> None:
    at_least = Target.of("speed", Spread(0.97, 0.9, 1.0), ">=", 0.97)
    at_most = Target.of("start", Spread(31.0, 29.0, 40.0), "<=", 30.0, "s")
    assert at_least.holds
    assert not at_most.holds
    with pytest.raises(ValidationError):
        Target.of("speed", Spread(1.0, 1.0, 1.0), "==", 1.0)


def test_the_document_comes_back_as_it_was(tmp_path: Path) -> None:
    report = Report.begin("throughput", {"name": "m", "num_layers": 2}, {"rounds": 3})
    report.rounds.append({"depth": 2, "tokens_per_second": 10.0, "inter_token_latency": None})
    report.summary.append({"depth": 2, "limit": None, "name": "[bold]"})
    report.targets.append(Target.of("speed", Spread(0.5, 0.4, 0.6), ">=", 0.97))
    path = report.save(tmp_path / "new" / "results")
    assert path.name == "throughput.json"
    again = Report.model_validate_json(path.read_text())
    assert again == report
    for name in ("processor", "num_cpus", "memory_gib", "python"):
        assert again.machine[name], name
    assert set(again.versions) == {"fathom-server", "torch", "transformers", "vllm"}
    assert again.command
    with pytest.raises(ValidationError):
        Report.model_validate({**report.model_dump(), "unknown": 1})


def test_the_table_says_which_targets_hold() -> None:
    report = Report.begin("peers", {"name": "m"}, {})
    report.summary.append({"peer": "[vLLM]", "tokens_per_second": 123.4, "limit": None})
    report.targets = [
        Target.of("faster", Spread(1.2, 1.1, 1.3), ">=", 1.0),
        Target.of("slower", Spread(0.2, 0.1, 0.3), ">=", 1.0),
    ]
    output = StringIO()
    report.print(Console(file=output, width=200))
    lines = {line.split()[1]: line for line in output.getvalue().splitlines() if "│" in line}
    assert "[vLLM]" in lines["[vLLM]"]
    assert lines["faster"].split()[-2] == "yes"
    assert lines["slower"].split()[-2] == "no"


def test_plots_are_files_of_both_kinds(tmp_path: Path) -> None:
    files = save_lines(
        tmp_path / "plots" / "a", {"x": {1: 2.0, 3: 4.0}, "limit": {1: 2.0}},
        x_label="x", y_label="y", title="t", dashed=["limit"],
    )  # fmt: skip
    files += save_bars(tmp_path / "b", {"x": {"p": 1.0, "q": 2.0}}, x_label="x", title="t")
    assert [file.name for file in files] == ["a.png", "a.svg", "b.png", "b.svg"]
    for file in files:
        begin = file.read_bytes()[:200]
        assert begin.startswith(b"\x89PNG") if file.suffix == ".png" else b"<?xml" in begin
