"""One engine of the dedicated engine: unmodified vLLM on the checkpoint of one depth."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruning.checkpoint import read_config
from server.background import BackgroundTask
from server.engine.arguments import (
    EngineConfig,
    base_arguments,
    check_kv_cache,
    cpu_arguments,
    gpu_arguments,
    refusal,
    wants_huge_pages,
)
from server.engine.base import EngineDead
from server.engine.dedicated.resources import Resources
from server.engine.supervisor import Supervisor
from server.engine.vllm_client import VllmClient
from server.engine.watchdog import Watchdog
from server.errors import Unavailable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_THREADS_VARIABLE = "OMP_NUM_THREADS"


class LevelEngine:
    """The engine of one depth, which restarts with back-off when its process has ended."""

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Path,
        depth: int,
        resources: Resources,
        starting: asyncio.Lock,
        on_restart: Callable[[], None],
        timeout_seconds: float,
        stall_seconds: float = 0.0,
    ) -> None:
        """``starting`` is held while an engine starts: they are started one after another.

        An engine that does not answer for ``timeout_seconds`` is killed, and one that does
        nothing at all after ``stall_seconds``; 0: never.
        """
        self.depth = depth
        self.llm = VllmClient()
        # Holds vLLM's metrics since the last start.
        self.registry: Any = None
        self._config = config
        self._checkpoint = checkpoint
        self._resources = resources
        self._starting = starting
        self._num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        name = f"the engine of depth {depth}"
        self._supervisor = Supervisor(self, lambda: True, on_restart, name=name)
        self._tasks = [BackgroundTask(f"the supervisor of {name}", self._supervisor.run)]
        if timeout_seconds:
            watchdog = Watchdog(self.llm, timeout_seconds, stall_seconds=stall_seconds)
            self._tasks.append(BackgroundTask(f"the watchdog of {name}", watchdog.run))
        self._is_supervised = False

    async def start(self) -> None:
        """Start the engine; the first start also begins its supervision."""
        async with self._starting:
            started = time.monotonic()
            from server.engine.dedicated.vllm_metrics import registry_and_logger

            registry, stat_logger = registry_and_logger()
            with _threads(self._resources.num_threads):
                await self.llm.start(self._configure, [stat_logger])
            if wants_huge_pages(self._config):
                await self.llm.use_huge_pages()
            self.registry = registry
            logger.info(
                "the engine of depth %d is up after %.1f s", self.depth, time.monotonic() - started
            )
        if not self._is_supervised:
            self._is_supervised = True
            for task in self._tasks:
                task.start()

    async def shutdown(self) -> None:
        for task in self._tasks:
            await task.stop()
        await self.llm.shutdown()

    @property
    def is_alive(self) -> bool:
        return self.llm.is_alive

    @contextmanager
    def in_use(self) -> Iterator[VllmClient]:
        """Use the engine for a request; raise :class:`Unavailable` if it is down or dies."""
        message = f"the engine of depth {self.depth} has died; it is being started again"
        if not self.is_alive:
            raise Unavailable(message)
        self._num_requests += 1
        self._idle.clear()
        try:
            yield self.llm
        except EngineDead as error:
            self._supervisor.report_death()
            raise Unavailable(message) from error
        finally:
            self._num_requests -= 1
            if not self._num_requests:
                self._idle.set()

    async def idle(self) -> None:
        """Return when no request uses the engine."""
        await self._idle.wait()

    def _configure(self) -> VllmConfig:
        from vllm import AsyncEngineArgs
        from vllm.config import CacheConfig
        from vllm.platforms import current_platform

        config, resources = self._config, self._resources
        arguments: dict[str, Any] = {
            **base_arguments(dataclasses.replace(config, model=self._checkpoint)),
            # All engines use the tokenizer of the model itself.
            "tokenizer": str(config.model),
        }
        given = dict(config.engine_args)
        if current_platform.is_cpu():
            quantized = "quantization_config" in read_config(self._checkpoint)
            arguments |= cpu_arguments(
                config, quantized=quantized, kv_cache_bytes=resources.kv_cache_bytes
            )
        else:
            whole = given.pop("gpu_memory_utilization", CacheConfig.gpu_memory_utilization)
            arguments["gpu_memory_utilization"] = whole * resources.share
            arguments |= gpu_arguments(config, resources.share)
        try:
            vllm_config = AsyncEngineArgs(**{**arguments, **given}).create_engine_config()
        except Exception as error:  # vLLM's checks raise exceptions of any class
            raise refusal(error, config) from error
        check_kv_cache(vllm_config, None)
        return vllm_config


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Set the number of threads of processes that are started inside, unless the operator has."""
    if number is None or _THREADS_VARIABLE in os.environ:
        yield
        return
    os.environ[_THREADS_VARIABLE] = str(number)
    try:
        yield
    finally:
        del os.environ[_THREADS_VARIABLE]
