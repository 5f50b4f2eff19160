"""``fathom bench``."""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Measure speed; 'fathom bench --help' lists the benchmarks."""
    # Imported here to keep the other commands quick.
    from bench.cli import run

    run(context.args)
