"""Runs GPTQModel in a process of its own, whose imports and memory end with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from pruning.process_end import how_it_ended, shortened
from pruning.quantization.errors import QuantizationError, QuantizationFailed
from pruning.weights import weight_bytes

OnLayers = Callable[[int, int], None]

_WORKER = "pruning.quantization.worker"
# GPTQModel does not start with fewer.
_MIN_CPU_WORKERS = 2
_SMALL_MODEL_BYTES = 64 << 20
_INSTALL = "pip install 'fathom-server[quantize]'"
# The package may lie beside this one without being installed.
_ROOT = str(Path(__file__).parents[2])


@dataclass(frozen=True, slots=True)
class Request:
    """A request to the process: quantize ``source`` into the empty directory ``out``.

    ``windows`` are token ids to calibrate on. ``scratch`` is a directory for data that does
    not fit into memory.
    """

    source: str
    out: str
    scratch: str
    bits: int
    group_size: int
    act_order: bool
    trust_remote_code: bool
    windows: Sequence[Sequence[int]]


def gptqmodel_version() -> str:
    """Return the version of GPTQModel; raises :class:`QuantizationError` where there is none."""
    try:
        return metadata.version("gptqmodel")
    except metadata.PackageNotFoundError:
        raise QuantizationError(
            f"quantization needs the package gptqmodel, which is not installed: {_INSTALL}"
        ) from None


class Stop:
    """Ends a quantization, when it is called in another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_called = False

    def __call__(self) -> None:
        with self._lock:
            self._is_called = True
            if self._process is not None:
                self._process.kill()

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._process = process
            if self._is_called:
                process.kill()


def run_worker(
    request: Request, on_layers: OnLayers | None = None, stop: Stop | None = None
) -> None:
    """Quantize in another process, and wait for it.

    ``on_layers`` is told how many layers are quantized, and how many there are. The process
    ends when this one does. Raises :class:`QuantizationFailed` with what went wrong in it.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as output, os.fdopen(reading, encoding="utf-8") as messages:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, str(writing)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                cwd=request.scratch,  # GPTQModel leaves its logs there
                env=_environment(Path(request.source)),
                # so that Ctrl-C, which reaches all of a terminal's processes, does not reach it
                start_new_session=True,
            )
        finally:
            os.close(writing)
        if stop is not None:
            stop.watch(process)
        # The process ends when its standard input is closed, at the latest with this process.
        with _ended_at_last(process) as requests:
            with suppress(BrokenPipeError):  # the process has ended, and has told why
                requests.write(json.dumps(asdict(request)).encode() + b"\n")
                requests.flush()
            problem = _follow(messages, on_layers)
            code = process.wait()
        if problem is not None or code != 0:
            raise QuantizationFailed(problem or how_it_ended("quantizes", code, output))


@contextmanager
def _ended_at_last(process: subprocess.Popen[bytes]) -> Iterator[IO[bytes]]:
    assert process.stdin is not None
    try:
        yield process.stdin
    finally:
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()


def _follow(messages: IO[str], on_layers: OnLayers | None) -> str | None:
    """Read the messages of the process until it ends; return its error, if it has sent one."""
    problem = None
    for line in messages:
        if not line.endswith("\n"):  # killed while it wrote
            break
        match json.loads(line):
            case {"error": str(error)}:
                problem = error
            case {"done": int(done), "total": int(total)} if on_layers is not None:
                on_layers(done, total)
    return None if problem is None else shortened(problem)


def _environment(source: Path) -> dict[str, str]:
    size = weight_bytes(source)
    num_cpus = len(os.sched_getaffinity(0))
    # Threads wait for each other after every operation, which is slow with small matrices.
    num_threads = 1 if size < _SMALL_MODEL_BYTES else num_cpus
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "GPTQMODEL_CPU_WORKERS": str(max(_MIN_CPU_WORKERS, min(num_cpus, 12))),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # the directory holds all that is needed
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "ignore",
    }
