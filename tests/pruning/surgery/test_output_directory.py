"""Directories of exports that were interrupted."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pruning.checkpoint import check_checkpoint
from pruning.surgery import SurgeryError, count_layers
from tests.pruning.surgery.exporting import export, large_model, plan_of, siblings, tensors


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_left_of_an_export_that_fails(
    model: Path, tmp_path: Path, error: type[BaseException], overwrite: bool
) -> None:
    out = tmp_path / "out"
    if overwrite:
        export(model, out, (1,))
    calls: list[tuple[int, int]] = []
    export(model, tmp_path / "other", (1, 2), on_progress=lambda *c: calls.append(c))
    assert calls[-1][0] == calls[-1][1]
    for fatal in range(1, len(calls) + 1):

        def fail(done: int, total: int, last: int = calls[fatal - 1][0]) -> None:
            if done >= last:
                raise error

        with pytest.raises(error):
            export(model, out, (1, 2), overwrite=overwrite, on_progress=fail)
        assert siblings(out) == (["out"] if overwrite else [])
    if overwrite:
        assert count_layers(out) == 3


def test_leftovers_of_killed_exports_are_removed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "o[u]t"
    (tmp_path / "o[u]t.partial-1").mkdir()
    (tmp_path / "o[u]t.partial-1" / "config.json").touch()
    export(model, out, (1,))
    assert siblings(out.parent / "o") == ["o[u]t"]
    # Killed between the renames of a replacement, and after them.
    out.rename(tmp_path / "o[u]t.replaced-1")
    with pytest.raises(SurgeryError, match="exists, allowed"):
        export(model, out, (1, 2))
    assert count_layers(out) == 3
    shutil.copytree(out, tmp_path / "o[u]t.replaced-1")
    export(model, out, (1, 2), overwrite=True)
    assert siblings(out.parent / "o") == ["o[u]t"]
    assert count_layers(out) == 2


def test_two_exports_to_one_directory(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refusals = []

    def another(done: int, total: int) -> None:
        with pytest.raises(SurgeryError, match="another process writes it") as caught:
            export(model, out, (1, 2))
        refusals.append(caught.value)

    export(model, out, (1,), on_progress=another)
    assert refusals
    assert count_layers(out) == 3
    assert siblings(out) == ["out"]


ENDLESS_EXPORT = """
import sys
from pathlib import Path
from pruning.plan import Plan
from pruning.surgery import export_checkpoint
model, out, plan = sys.argv[1:]
plan = Plan.load(plan)
print("ready", flush=True)
while True:
    for depth in (1, 2, 3):
        export_checkpoint(model, out, plan, depth, overwrite=True)
"""


@pytest.fixture
def killed_exports(tmp_path: Path) -> Iterator[Path]:
    """Kill exports to one directory at random moments; yields that directory each time."""
    source = large_model(tmp_path / "model", 3 << 20)
    plan_of(source).save(tmp_path / "plan.json")
    return _killed_exports(source, tmp_path / "out", tmp_path / "plan.json")


def _killed_exports(source: Path, out: Path, plan: Path) -> Iterator[Path]:
    rng = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_EXPORT, source, out, plan],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.5))
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        yield out


def test_kill_at_any_moment_leaves_a_whole_directory_or_none(
    killed_exports: Iterator[Path], tmp_path: Path
) -> None:
    for out in killed_exports:
        if out.exists():
            check_checkpoint(out)
            assert len(tensors(out)) == count_layers(out)
    export(tmp_path / "model", out, (2,), overwrite=True)
    assert siblings(out) == ["out"]
    assert len(tensors(out)) == 3
