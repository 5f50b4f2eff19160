"""The end of the engine's processes when the server has gone."""

from __future__ import annotations

import multiprocessing
import os
import threading

_NAME = "end-with-parent"


def end_with_parent() -> None:
    """End this process when the one that started it is gone; call it in a child process.

    A server that is killed has no chance to end its engine, which would hold its memory for
    good. In a process that multiprocessing has not started, nothing is done.
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _NAME for thread in threading.enumerate()):
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name=_NAME, daemon=True).start()
