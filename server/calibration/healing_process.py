"""Runs a training of stand-ins in a process of its own, whose memory ends with it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pruning.process_end import how_it_ended, shortened
from pruning.repair import HealingStep, RepairError
from pruning.repair.healing_job import HealingJob

_WORKER = "pruning.repair.healing_worker"
# The package may lie beside this one without being installed.
_ROOT = str(Path(__file__).parents[2])
_MAX_MESSAGE = 300


async def heal_beside(job: HealingJob, on_step: Callable[[HealingStep], None]) -> None:
    """Train at the lowest priority, on one processor, and without the GPU that the engine fills.

    The process ends when the call is cancelled, and with this one. Raises :class:`RepairError`
    with what went wrong in it.
    """
    with tempfile.TemporaryFile() as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            _WORKER,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=output,
            env=_environment(),
            # so that Ctrl-C, which reaches all of a terminal's processes, does not reach it
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has ended, and told why
                process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
                await process.stdin.drain()
            problem = await _follow(process.stdout, on_step)
            code = await process.wait()
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if problem is not None or code != 0:
            raise RepairError(problem or how_it_ended("heals", code, output))


async def _follow(
    messages: asyncio.StreamReader, on_step: Callable[[HealingStep], None]
) -> str | None:
    """Read the messages of the process until it ends; return its error, if it has sent one."""
    problem = None
    async for line in messages:
        if not line.endswith(b"\n"):  # killed while it wrote
            break
        match json.loads(line):
            case {"error": str(error)}:
                problem = shortened(error)
            case {"step": step, "total": total, "loss": loss, "held_out_loss": held_out_loss}:
                on_step(HealingStep(step, total, loss, held_out_loss))
    return problem


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",  # the directory holds all that is needed
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "ignore",
    }
