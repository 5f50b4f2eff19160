"""Imports of the fork server; see :mod:`server.engine.fork_server`.

An engine's process needs all of these modules. None of them may use a device or start a thread:
neither would survive the fork.
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
# Errors are left to the engine's process, which imports the modules again and reports them.
with contextlib.suppress(Exception):
    for name in _MODULES:
        importlib.import_module(name)
