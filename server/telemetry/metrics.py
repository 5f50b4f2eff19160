"""Prometheus metrics."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from server.depth.policy import DepthPolicy
from server.depth.repair import RepairStatus
from server.depth.served_depth import Reason
from server.depth.sliding_window import SlidingWindow
from server.engine.base import LayerSelection, LoadInfo
from server.telemetry.probe_gauges import probe_gauges
from server.telemetry.repair_metrics import RepairCollector

# The gauge of tokens per second is a mean over this time.
WINDOW_SECONDS = 10

_TOKEN_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1,
    2.5,
)
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The ``fathom_*`` metrics, in a registry of their own.

    The label ``depth`` is the number of decode layers; it is empty for requests that were refused
    before they had a depth. The methods are for the thread of the event loop; a scrape may come
    from any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        disable_created_metrics()  # they are a second series for every counter
        self.registry = CollectorRegistry(support_collectors_without_names=True)
        self._requests = Counter(
            "fathom_requests_total",
            "Calls that have ended, by gRPC method and status code.",
            ["method", "depth", "code"],
            registry=self.registry,
        )
        self._prompt_tokens = Counter(
            "fathom_prompt_tokens_total",
            "Prompt tokens of requests that have begun to generate.",
            ["depth"],
            registry=self.registry,
        )
        self._generation_tokens = Counter(
            "fathom_generation_tokens_total",
            "Generated tokens.",
            ["depth"],
            registry=self.registry,
        )
        self._generation_layers = Counter(
            "fathom_generation_layers_total",
            "Layers that ran for generated tokens; divided by the tokens, their mean depth.",
            registry=self.registry,
        )
        self._served = Counter(
            "fathom_requests_served_total",
            "Requests that have ended, by why they were served at their depth.",
            ["reason"],
            registry=self.registry,
        )
        for reason in Reason:
            self._served.labels(reason.value)
        self._time_to_first_token = self._histogram(
            "fathom_time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            _REQUEST_SECONDS,
        )
        self._inter_token_latency = self._histogram(
            "fathom_inter_token_latency_seconds",
            "Time between two tokens of a request.",
            _TOKEN_SECONDS,
        )
        self._request_duration = self._histogram(
            "fathom_request_duration_seconds",
            "Time from a request's arrival to its end, however it ended.",
            _REQUEST_SECONDS,
        )
        self._request_queue = self._histogram(
            "fathom_request_queue_seconds",
            "Time from a request's arrival until the engine begins to run its prompt.",
            _REQUEST_SECONDS,
        )
        self._running = Gauge(
            "fathom_requests_running", "Requests in the engine's batch.", registry=self.registry
        )
        self._waiting = Gauge(
            "fathom_requests_waiting",
            "Requests that wait for a slot in the engine's batch.",
            registry=self.registry,
        )
        self._startup = Gauge(
            "fathom_startup_seconds",
            "How long the phases of the start took.",
            ["phase"],
            registry=self.registry,
        )
        self._engine_up = Gauge(
            "fathom_engine_up", "Whether the engine is up.", registry=self.registry
        )
        self._tasks = Gauge(
            "fathom_tasks",
            "Asyncio tasks of the server; a few if there are no calls.",
            registry=self.registry,
        )
        self._engine_restarts = Counter(
            "fathom_engine_restarts_total",
            "Restarts of the engine after it had died.",
            registry=self.registry,
        )
        self._certificate_expiry = Gauge(
            "fathom_tls_certificate_expiry_timestamp_seconds",
            "When the certificate in force expires, in seconds since the epoch.",
            ["certificate"],  # without TLS there is no sample
            registry=self.registry,
        )
        self._policy_changes = Counter(
            "fathom_policy_changes_total",
            "Changes of the level of automatic depth because of load.",
            ["direction"],
            registry=self.registry,
        )
        self._non_finite_results = Counter(
            "fathom_non_finite_results_total",
            "Requests that ended because the model computed what is not a finite number.",
            ["depth"],
            registry=self.registry,
        )
        for direction in ("down", "up"):
            self._policy_changes.labels(direction)
        self._rate = _TokenRate(clock)
        self._policy = _PolicyCollector()
        self.registry.register(self._rate)
        self.registry.register(self._policy)
        self._repair = RepairCollector()
        self.registry.register(self._repair)

    def count_request(self, method: str, depth: str, code: str) -> None:
        """Count a call that has ended with a status code."""
        self._requests.labels(method, depth, code).inc()

    def count_served(self, reason: Reason) -> None:
        """Count a request that has ended, by why it had its depth."""
        self._served.labels(reason.value).inc()

    def begin(self, depth: int, num_prompt_tokens: int, queue: float, first_token: float) -> None:
        """Count a request that got its first token.

        ``queue`` and ``first_token`` are the seconds from its arrival until the engine began to run
        its prompt and until its first token.
        """
        self._prompt_tokens.labels(depth).inc(num_prompt_tokens)
        self._request_queue.labels(depth).observe(queue)
        self._time_to_first_token.labels(depth).observe(first_token)

    def add_tokens(self, depth: int, num_tokens: int) -> None:
        """Count generated tokens."""
        self._generation_tokens.labels(depth).inc(num_tokens)
        self._generation_layers.inc(depth * num_tokens)
        self._rate.add(str(depth), num_tokens)

    def observe_inter_token_latency(self, depth: int, seconds: float, num_tokens: int) -> None:
        """Count the inter-token latency of a step that came ``seconds`` after the one before."""
        for _ in range(num_tokens):
            self._inter_token_latency.labels(depth).observe(seconds / num_tokens)

    def end(self, depth: int, seconds: float) -> None:
        """Count a request that ended ``seconds`` after its arrival."""
        self._request_duration.labels(depth).observe(seconds)

    def watch_engine(
        self,
        is_up: Callable[[], bool],
        load: Callable[[], LoadInfo],
        can_run: Callable[[LayerSelection], bool],
    ) -> None:
        """Let scrapes ask the engine itself; the functions must be safe in any thread."""
        self._policy.can_run = can_run
        self._engine_up.set_function(lambda: float(is_up()))
        self._running.set_function(lambda: load().num_running)
        self._waiting.set_function(lambda: load().num_waiting)

    def watch_tasks(self, count: Callable[[], int]) -> None:
        """Let scrapes count the server's tasks; the function must be safe in any thread."""
        self._tasks.set_function(count)

    def count_engine_restart(self) -> None:
        self._engine_restarts.inc()

    def count_policy_change(self, *, down: bool) -> None:
        """Count a change of automatic depth, down or up."""
        self._policy_changes.labels("down" if down else "up").inc()

    def count_non_finite_result(self, depth: int) -> None:
        """Count a request that ended because of values that are not finite."""
        self._non_finite_results.labels(depth).inc()

    def set_startup(self, phase: str, seconds: float) -> None:
        """Set how long a phase of the start took."""
        self._startup.labels(phase).set(seconds)

    def set_certificate_expiry(self, timestamp: float) -> None:
        """Set when the server's certificate expires, in seconds since the epoch."""
        self._certificate_expiry.labels("server").set(timestamp)

    def set_policy(self, policy: DepthPolicy) -> None:
        """Show the measurements, scores and levels of this policy."""
        self._policy.policy = policy
        for level in policy.levels:  # so that the first failure at a level is an increase
            self._non_finite_results.labels(level.decode_layers)

    def set_repair(self, status: RepairStatus) -> None:
        """Show what stands in for skipped layers."""
        self._repair.status = status

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, documentation, ["depth"], buckets=buckets, registry=self.registry)


class _TokenRate(Collector):
    """The gauge of tokens per second over the last seconds, counted in steps of one second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: defaultdict[str, SlidingWindow] = defaultdict(
            lambda: SlidingWindow(WINDOW_SECONDS, grain=1.0)
        )

    def add(self, depth: str, num_tokens: int) -> None:
        with self._lock:
            self._tokens[depth].add(self._clock(), count=num_tokens)

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "fathom_tokens_per_second",
            f"Generated tokens per second over the last {WINDOW_SECONDS} seconds.",
            labels=["depth"],
        )
        with self._lock:
            now = self._clock()
            for depth, tokens in self._tokens.items():
                family.add_metric([depth], tokens.count(now) / WINDOW_SECONDS)
        yield family


class _PolicyCollector(Collector):
    """Gauges of the policy in force; a scrape sees one policy, never parts of two."""

    def __init__(self) -> None:
        self.policy: DepthPolicy | None = None
        self.can_run: Callable[[LayerSelection], bool] = lambda layers: False

    def collect(self) -> Iterator[Metric]:
        policy = self.policy
        if policy is None:
            return
        qualities = {
            str(depths.decode_layers): quality
            for depths, quality in sorted(policy.qualities.items())
            if depths.prefill_layers == depths.decode_layers
        }
        yield _gauge(
            "fathom_depth_perplexity",
            "Perplexity on held-out text.",
            "depth",
            {depth: quality.perplexity for depth, quality in qualities.items()},
        )
        yield _gauge(
            "fathom_depth_perplexity_stderr",
            "Standard error of the perplexity.",
            "depth",
            {depth: quality.perplexity_stderr for depth, quality in qualities.items()},
        )
        yield _gauge(
            "fathom_depth_agreement_ratio",
            "Share of positions whose most likely next token is that of the dense model.",
            "depth",
            {depth: quality.agreement for depth, quality in qualities.items()},
        )
        yield _gauge(
            "fathom_depth_kl_nats",
            "Mean KL divergence of the next-token distribution from dense, in nats.",
            "depth",
            {depth: quality.kl_nats for depth, quality in qualities.items()},
        )
        yield _gauge(
            "fathom_depth_measured_tokens_per_second",
            "Generated tokens per second at full load, as measured when the server started.",
            "depth",
            {
                str(depths.decode_layers): speed.tokens_per_second
                for depths, speed in sorted(policy.speeds.items())
                if depths.prefill_layers == depths.decode_layers
            },
        )
        yield _gauge(
            "fathom_layer_block_influence",
            "1 minus the mean cosine of the residual stream before and after the layer.",
            "layer",
            {str(layer): score for layer, score in enumerate(policy.plan.scores)},
        )
        yield _gauge(
            "fathom_policy_level",
            "1 for the present level of requests that leave the depth to the server, else 0.",
            "level",
            {level.name: float(level.name == policy.present_level) for level in policy.levels},
        )
        yield _gauge(
            "fathom_policy_score_level",
            "The same for requests to Score.",
            "level",
            {
                level.name: float(level.name == policy.present_score_level)
                for level in policy.levels
            },
        )
        yield from probe_gauges(policy)
        yield _gauge(
            "fathom_level_max_quality_loss",
            "What the depths of the level were chosen for: perplexity over dense's, minus 1.",
            "level",
            {level.name: level.max_quality_loss for level in policy.levels},
        )
        yield _gauge(
            "fathom_level_max_writing_loss",
            "The same of what it writes, where repetition counts as well.",
            "level",
            {level.name: level.max_writing_loss for level in policy.levels},
        )
        yield _gauge(
            "fathom_level_max_choosing_loss",
            "The same of how it chooses: dense's accuracy minus the level's.",
            "level",
            {level.name: level.max_choosing_loss for level in policy.levels},
        )
        yield _gauge(
            "fathom_level_up",
            "Whether the engine that runs the level is up.",
            "level",
            {
                name: float(self.can_run(layers))
                for name, layers in policy.level_selections().items()
            },
        )
        degraded = GaugeMetricFamily(
            "fathom_policy_degraded",
            "Whether load has turned down the depth of requests that leave it to the server.",
            value=float(policy.is_degraded),
        )
        yield degraded


def _gauge(name: str, documentation: str, label: str, values: Mapping[str, float | None]) -> Metric:
    """Return a family of samples by label; a value of None was not measured and is left out."""
    family = GaugeMetricFamily(name, documentation, labels=[label])
    for key, value in values.items():
        if value is not None:
            family.add_metric([key], value)
    return family
