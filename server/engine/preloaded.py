"""Imported by the process that engines are forked from; see :mod:`server.engine.fork_server`.

It holds what an engine's process imports on its way. Nothing in it may use a device or start a
thread: neither would survive the fork.
"""

from __future__ import annotations

import contextlib
import importlib

# The title of a process can be set only where its arguments were found before anything changed.
with contextlib.suppress(ImportError):
    import setproctitle

    setproctitle.getproctitle()

_MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "server.engine.elastic.model",
    "server.engine.elastic.worker_extension",
)
# Whatever is wrong with them is for the engine's process to report, which imports them again.
with contextlib.suppress(Exception):
    for name in _MODULES:
        importlib.import_module(name)
