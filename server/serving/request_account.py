"""Accounting of a request's steps."""

from __future__ import annotations

from server.depth.autodepth import AutoDepth
from server.depth.served_depth import ServedDepth
from server.serving.admission import Admission, Admitted
from server.serving.fair_queue import Slot
from server.telemetry.metrics import Metrics

# Prompt tokens that a generated token counts for in the client's share of the engine: two, as in
# the paper that the queue follows, because each generated token takes a step of its own.
_GENERATED_TOKEN_COST = 2.0


class RequestAccount:
    """Counts a request's steps in the metrics, the latencies and its client's share.

    An observer of :class:`server.serving.request_runner.RequestRunner`.
    """

    def __init__(
        self,
        admitted: Admitted,
        slot: Slot,
        served: ServedDepth,
        num_layers: int,
        *,
        admission: Admission,
        auto: AutoDepth,
        metrics: Metrics,
    ) -> None:
        self._admitted = admitted
        self._slot = slot
        self._depth = served.decode_layers
        self._token_cost = _GENERATED_TOKEN_COST * served.decode_layers / num_layers
        self._admission = admission
        self._auto = auto
        self._metrics = metrics

    def first_step(self, num_tokens: int, *, queue: float, seconds: float) -> None:
        self._metrics.begin(self._depth, self._admitted.num_tokens, queue, seconds)
        self._auto.observe(seconds, None)
        self._admission.begin(self._admitted)
        self._count(num_tokens)

    def next_step(self, num_tokens: int, *, seconds: float) -> None:
        self._metrics.observe_inter_token_latency(self._depth, seconds, num_tokens)
        self._auto.observe(seconds, num_tokens)
        self._count(num_tokens)

    def finished(self) -> None:
        self._slot.end()

    def _count(self, num_tokens: int) -> None:
        self._metrics.add_tokens(self._depth, num_tokens)
        self._slot.charge(self._token_cost * num_tokens)
