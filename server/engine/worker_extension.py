"""Methods of the workers of any engine, called over vLLM's collective_rpc."""

from __future__ import annotations

import threading

from server.engine.huge_pages import use_huge_pages


class WorkerExtension:
    """Methods that vLLM mixes into its worker."""

    def fathom_use_huge_pages(self) -> None:
        """Begin to move this process's memory into huge pages, and return at once.

        That takes some seconds for each gigabyte. Steps go on meanwhile.
        """
        threading.Thread(target=use_huge_pages, name="huge-pages", daemon=True).start()
