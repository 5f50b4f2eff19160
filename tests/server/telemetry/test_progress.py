"""Progress: bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from server.telemetry.progress import ProgressReport


def test_log_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with ProgressReport(Console(file=io.StringIO())) as report:
        with report.working("Loading"):
            pass
        for done in range(1, 1001):
            report.advance("Ranking", done, 1000)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "Loading"
    assert lines[1].startswith("Loading: done in ")
    # The first and the last line, and no more than one for each pause in between.
    assert lines[2] == "Ranking: 0 %"
    assert lines[-1] == "Ranking: 100 %"
    assert len(lines) < 100


def test_bars_on_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output = io.StringIO()
    with ProgressReport(Console(file=output, force_terminal=True, width=80)) as report:
        with report.working("Loading"):
            pass
        report.advance("Ranking", 250, 1000)
    assert "Loading" in output.getvalue()
    assert "25 %" in output.getvalue()
    assert not caplog.records


def test_work_that_fails_leaves_the_terminal_usable() -> None:
    output = io.StringIO()
    report = ProgressReport(Console(file=output, force_terminal=True))
    with pytest.raises(ValueError, match="broken"), report, report.working("Loading"):
        raise ValueError("broken")
    assert output.getvalue().rindex("\x1b[?25h") > output.getvalue().rindex("\x1b[?25l")
