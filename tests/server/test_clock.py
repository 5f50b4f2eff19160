"""The time of day, which people and time servers change, decides nothing."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Where it is told, never reckoned with: when a plan was made, and when a call came. And it is what
# the validity of certificates is about.
ALLOWED = {
    "pruning/plan.py",
    "server/access/certificates.py",
    "server/calls/call_record.py",
    # Files have the time of day of their last change. Where it jumps, a file is hashed once more.
    "server/file_hashes.py",
    # OpenAI's API tells when a model was made known, in seconds since the epoch.
    "server/openai/models.py",
    # A report, and a plan that it makes, tell when they were made.
    "server/report/quantizer.py",
    "server/report/report.py",
}
MODULES = {"time", "datetime", "date", "datetime.datetime", "datetime.date"}
TIMES_OF_DAY = {"time", "time_ns", "now", "utcnow", "today", "localtime"}


def uses_time_of_day(path: Path) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and node.attr in TIMES_OF_DAY
        and ast.unparse(node.value) in MODULES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    )


def test_durations_and_deadlines_are_those_of_a_monotonic_clock() -> None:
    found = {
        str(path.relative_to(ROOT))
        for package in ("pruning", "server")
        for path in (ROOT / package).rglob("*.py")
        if uses_time_of_day(path)
    }
    assert found == ALLOWED
