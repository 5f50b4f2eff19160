"""Imported by the process that engines are forked from; see :mod:`server.engine.fork_server`.

It holds what an engine's process imports on its way. Nothing in it may use a device or start a
thread: neither would survive the fork.
"""

from __future__ import annotations

import contextlib
import importlib

# A process can change its title only if setproctitle has found its arguments early.
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
# The engine's process imports them again, and reports what is wrong with them.
with contextlib.suppress(Exception):
    for name in _MODULES:
        importlib.import_module(name)
