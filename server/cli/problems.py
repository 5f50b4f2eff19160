"""Error messages of one line, without a traceback."""

from __future__ import annotations

import sys


def report_problem(problem: str) -> None:
    print(f"fathom: {' '.join(problem.split())}", file=sys.stderr)
