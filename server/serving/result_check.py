"""Checks whether the depths that are served give finite results."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from server.background import BackgroundTask
from server.engine.base import Engine, EngineDead, LayerSelection
from server.errors import FathomError, NonFiniteResult
from server.serving.service_state import ServiceState
from server.telemetry.metrics import Metrics

# Tokens of the server's own prompt, at most.
MAX_CHECK_TOKENS = 32
# A depth that was found sound is not checked again earlier, however often requests fail at it.
_RECHECK_SECONDS = 60.0

logger = logging.getLogger(__name__)


class ResultCheck:
    """Runs a prompt of the server's own at each level, and wherever a request's result was not
    finite, and tells the service's state what is found.

    A request alone proves nothing: a sound model in a dtype of small range may overflow on some
    prompts, and no client may turn the server's health. Belongs to the thread of the event loop.
    """

    def __init__(
        self,
        engine: Engine,
        state: ServiceState,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._state = state
        self._metrics = metrics
        self._clock = clock
        self._default: LayerSelection | None = None
        self._levels: tuple[LayerSelection, ...] = ()
        # In the order in which they are to be checked.
        self._waiting: dict[LayerSelection, None] = {}
        self._is_needed = asyncio.Event()
        # When each depth was found sound, on the clock; what is wrong with the others.
        self._sound: dict[LayerSelection, float] = {}
        self._problems: dict[LayerSelection, str] = {}
        self._logged: set[str] = set()
        self._num_checks = 0

    def task(self) -> BackgroundTask:
        """Return what is to run as long as the service is open."""
        return BackgroundTask("what checks the model's results", self._run)

    def follow(self, levels: Iterable[LayerSelection], default: LayerSelection) -> None:
        """Check ``levels``, unless that has been done; health depends on ``default`` alone."""
        self._levels, self._default = tuple(levels), default
        for layers in self._levels:
            if layers not in self._sound and layers not in self._problems:
                self._want(layers)
        self._tell()

    def engine_restarted(self) -> None:
        """Check all levels anew: the engine has loaded the weights again."""
        self._sound.clear()
        self._problems.clear()
        self._tell()
        for layers in self._levels:
            self._want(layers)

    @contextmanager
    def watching(self, layers: LayerSelection, depth: int, request: str) -> Iterator[None]:
        """Count, log and check what a request at ``layers`` raises if its result is not finite.

        ``depth`` is the label in the metrics, ``request`` what the log calls the request.
        """
        try:
            yield
        except NonFiniteResult as error:
            self._metrics.count_non_finite_result(depth)
            if error.depth not in self._logged:
                self._logged.add(error.depth)
                logger.error(
                    "%s: %s; further ones at this depth are counted, not logged", request, error
                )
            found = self._sound.get(layers)
            if found is None or self._clock() - found > _RECHECK_SECONDS:
                self._want(layers)
            raise

    def _want(self, layers: LayerSelection) -> None:
        self._waiting[layers] = None
        self._is_needed.set()

    async def _run(self) -> None:
        while True:
            await self._is_needed.wait()
            self._is_needed.clear()
            while self._waiting:
                layers = next(iter(self._waiting))
                del self._waiting[layers]
                await self._check(layers)

    async def _check(self, layers: LayerSelection) -> None:
        model = self._engine.model
        num_tokens = max(2, min(MAX_CHECK_TOKENS, model.max_context - 1))
        token_ids = [model.vocab_size * i // num_tokens for i in range(num_tokens)]
        self._num_checks += 1
        try:
            # In a cache of its own, which nobody reads.
            await self._engine.score(f"check-{self._num_checks}", token_ids, 1, layers)
        except NonFiniteResult as error:
            self._sound.pop(layers, None)
            if layers not in self._problems:
                logger.error("a prompt of the server's own shows that %s", error)
            self._problems[layers] = str(error)
        except (EngineDead, FathomError) as error:
            # Levels are checked again when the engine has been restarted.
            logger.debug("the check of %s did not come to its end: %s", layers, error)
            return
        else:
            self._sound[layers] = self._clock()
            self._problems.pop(layers, None)
        self._tell()

    def _tell(self) -> None:
        self._state.set_problems(
            tuple(self._problems.values()), is_damaged=self._default in self._problems
        )
