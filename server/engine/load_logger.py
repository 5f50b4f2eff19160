"""The number of requests that vLLM's scheduler holds."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from server.engine.base import LoadInfo


class LoadLogger(StatLoggerBase):
    """Keeps the scheduler's latest counts."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.load = LoadInfo(num_running=0, num_waiting=0)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self.load = LoadInfo(scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs)

    def log_engine_initialized(self) -> None:
        """Nothing to say: the server reports its own start."""
