from __future__ import annotations

import subprocess
import sys

from bench.machine import ForeignLoad, describe_machine

BUSY = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"


def test_the_work_of_children_is_not_foreign() -> None:
    """Whatever else runs here: what a child of this process uses must not be added to it."""
    foreign = ForeignLoad()
    busy_before, own_before, total_before = ForeignLoad._read()
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    busy, own, total = ForeignLoad._read()
    assert own - own_before > 0.4
    assert busy - busy_before > 0.4
    assert total > total_before
    assert 0.0 <= foreign.share() <= 1.0


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["num_cpus"]
    assert machine["processor"]
