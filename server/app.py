"""The composition root: from settings to a server that serves, and back down again."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Any

import psutil

from pruning.checkpoint import CheckpointError
from pruning.fingerprint import text_fingerprint
from pruning.plan import Plan
from pruning.quantization import QuantizationError, plan_of_base
from pruning.surgery import SurgeryError
from pruning.text import TextError
from server.access.exposure import check_exposure
from server.calibration.calibrator import Calibrator, Progress
from server.calibration.hardware import describe_hardware
from server.calibration.offline_plan import kept_plan, plan_key
from server.calibration.policy_store import PlanFile, PolicyStore
from server.calibration.versions import measuring_versions
from server.config import Settings
from server.depth.policy import DepthPolicy
from server.engine.base import Engine, ModelInfo
from server.engine.dedicated.engine import DedicatedConfig, DedicatedEngine
from server.engine.elastic.engine import ElasticEngine
from server.engine.elastic.engine_arguments import ElasticConfig
from server.engine.fork_server import start_fork_server
from server.model.inputs import Inputs, StartError, auto_rules, read_inputs, refused_as
from server.model.quantized import QuantizedModel
from server.reload import Reload, access_files
from server.rpc.access import Access
from server.rpc.interceptors import Observer
from server.rpc.server import RpcServer
from server.serving.fair_queue import slots_for
from server.serving.service import Service
from server.state import StateDirectory
from server.telemetry.log_format import with_fields
from server.telemetry.logs import Logs
from server.telemetry.metrics import Metrics
from server.telemetry.metrics_port import MetricsPort
from server.telemetry.progress import ProgressReport
from server.telemetry.request_log import log_request
from server.telemetry.tracing import open_tracing
from server.version import VERSION

# Of models with more layers, quality is measured at the levels alone.
_LAYERS_FOR_EVERY_DEPTH = 16
_DEFAULT_PORT = 50051
_END_SECONDS = 2.0

_WORK = {
    "importance": "Ranking the layers",
    "levels": "Starting the engines of the levels",
    "quality": "Measuring quality",
    "speed": "Measuring speed",
}

logger = logging.getLogger(__name__)


def serve(settings: Settings, read_again: Callable[[], Settings]) -> None:
    """Serve until SIGTERM or SIGINT; on SIGHUP use the settings that ``read_again`` returns.

    Raises:
        StartError: the server cannot start with these settings.
    """
    logs = Logs(settings.log_level, settings.log_format)
    try:
        asyncio.run(Application(settings, read_again, logs).run())
    except StartError as error:
        if not logs.is_json:
            raise
        logger.error("%s", error)
        sys.exit(2)


class Application:
    """One server, from its start to its end."""

    def __init__(self, settings: Settings, read_again: Callable[[], Settings], logs: Logs) -> None:
        self._settings = settings
        self._read_again = read_again
        self._logs = logs
        self._progress = ProgressReport(logs.console)
        self._serving = False
        self._stop = asyncio.Event()
        self._hangup = asyncio.Event()
        self._store: PolicyStore | None = None

    async def run(self) -> None:
        """Serve until a signal, then let what runs finish. A second signal ends it at once."""
        settings = self._settings
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup)
        with refused_as("host"):
            check_exposure(settings)
        if settings.trust_remote_code:
            logger.warning(
                "trust_remote_code is on: code that comes with the model runs with all rights "
                "of this server"
            )
        started = time.monotonic()
        inputs = await asyncio.to_thread(read_inputs, settings)
        inputs_seconds = time.monotonic() - started
        async with AsyncExitStack() as stack:
            metrics = Metrics()
            with refused_as("clients"):
                access = Access(access_files(settings), metrics)
            with refused_as("metrics_port"):
                metrics_port = MetricsPort(metrics, settings.metrics_host, settings.metrics_port)
            stack.callback(metrics_port.close)
            engine = _engine(settings, inputs)
            service = Service(
                engine,
                metrics,
                max_running=slots_for(settings.max_num_seqs * _num_engines(settings, inputs)),
                max_waiting=settings.max_waiting,
                max_waiting_tokens=settings.max_waiting_tokens,
                max_unread=settings.max_unread,
                share_prefix_cache=settings.share_prefix_cache,
                engine_timeout_seconds=settings.engine_timeout_seconds,
                auto_rules=auto_rules(settings),
                grace_seconds=settings.grace_seconds,
                version=VERSION,
                save=self._save,
            )
            observers: list[Observer] = [log_request]
            with refused_as("otlp_endpoint"):
                tracing = open_tracing(settings.otlp_endpoint, VERSION)
            if tracing is not None:
                stack.callback(tracing.close)
                observers.append(tracing.observer(lambda: service.model_name))
            rpc_server = RpcServer(
                service,
                settings.host,
                settings.port,
                max_message_bytes=settings.max_message_bytes,
                max_concurrent_streams=settings.max_streams_per_connection,
                max_connection_age_seconds=settings.max_connection_seconds,
                tls=access.tls,
                authenticator=access.authenticator,
                observers=observers,
            )
            with refused_as("port"):
                await rpc_server.start()
            start_fork_server()  # what it takes long for is done by the time it is needed
            stack.push_async_callback(engine.shutdown)
            stack.push_async_callback(service.close)
            stack.push_async_callback(rpc_server.stop)
            for following in (access.follow(), metrics_port.follow()):
                stack.callback(asyncio.create_task(following).cancel)
            metrics.set_startup("inputs", inputs_seconds)
            with self._progress:
                await self._start(inputs, engine, service)
            self._serving = True
            self._announce(service, rpc_server.port, metrics_port.url)
            reload = Reload(
                settings,
                self._read_again,
                access=access,
                service=service,
                set_log_level=self._logs.set_level,
            )
            reloading = asyncio.create_task(self._reload_on_hangup(reload))
            stack.callback(reloading.cancel)
            await self._stop.wait()
            logger.info("stopping; requests that run have %g s", settings.grace_seconds)
            await service.drain()

    async def _start(self, inputs: Inputs, engine: Engine, service: Service) -> None:
        """Load the model, and get its plan and measurements from the state directory or anew."""
        if inputs.quantized is not None:
            inputs = await self._quantize(inputs, inputs.quantized, service)
        with (
            self._progress.working("Loading the model"),
            service.phase("engine"),
            refused_as("engine", Exception),  # there is no telling what vLLM may find
        ):
            await engine.start()
        with refused_as("model"):
            with service.phase("plan"):
                calibrator = self._calibrator(inputs, engine)
                store = self._store = self._policy_store(inputs, engine.model)
                plan = inputs.plan or self._kept_plan(inputs, engine)
                plan = plan or await store.plan(lambda: calibrator.measure_plan(self._on_progress))
            policy = DepthPolicy(
                plan, inputs.levels, inputs.default_level, any_depth=engine.serves_any_depth
            )
            if not policy.any_depth:
                with service.phase("levels"):
                    await engine.prepare(
                        plan,
                        policy.level_selections(),
                        lambda done, total: self._on_progress(Progress("levels", done, total)),
                    )
            with service.phase("quality"):
                qualities = await store.qualities(
                    policy,
                    calibrator.depths_to_measure(policy),
                    lambda missing: calibrator.measure_quality(policy, missing, self._on_progress),
                )
            with service.phase("speed"):
                speeds = await store.speeds(
                    policy,
                    calibrator.depths_to_time(policy),
                    lambda missing: calibrator.measure_speed(policy, missing, self._on_progress),
                )
        service.open(policy.with_measurements(qualities, speeds), calibrator)
        # Whoever had set others over Control may look for them here.
        logger.info(
            "levels, as the settings have them: %s; the default is %s",
            ", ".join(map(str, policy.levels)),
            policy.default_level,
        )
        for phase, seconds in service.status().startup_seconds.items():
            logger.info("start: %s took %.1f s", phase, seconds)

    async def _quantize(self, inputs: Inputs, model: QuantizedModel, service: Service) -> Inputs:
        """Have the model quantized, or find that it has been; return what to start with then."""
        errors = (QuantizationError, SurgeryError, CheckpointError, TextError, OSError)
        with service.phase("quantize"), refused_as("quantize", *errors):
            fingerprint = await model.prepare(
                lambda *layers: self._progress.advance("Quantizing the layers", *layers)
            )
        plan = inputs.plan and plan_of_base(inputs.plan, model.directory, fingerprint)
        return replace(inputs, fingerprint=fingerprint, plan=plan)

    def _calibrator(self, inputs: Inputs, engine: Engine) -> Calibrator:
        settings = self._settings
        every_depth = settings.quality_depths == "all" or (
            settings.quality_depths is None and inputs.num_layers <= _LAYERS_FOR_EVERY_DEPTH
        )
        return Calibrator(
            engine,
            model_fingerprint=inputs.fingerprint,
            versions=measuring_versions(),
            texts=inputs.texts,
            max_tokens=settings.calibration_tokens,
            held_out_texts=inputs.held_out_texts,
            max_held_out_tokens=settings.quality_tokens,
            every_depth=every_depth,
        )

    def _kept_plan(self, inputs: Inputs, engine: Engine) -> Plan | None:
        """Return a plan that was measured elsewhere, where this engine cannot measure one itself.

        A model is loaded for it otherwise, only to be measured.
        """
        if engine.serves_any_depth:
            return None
        return kept_plan(self._settings, inputs.fingerprint, inputs.texts)

    def _policy_store(self, inputs: Inputs, model: ModelInfo) -> PolicyStore:
        settings = self._settings
        key = {
            "model": inputs.fingerprint,
            "dtype": model.dtype,
            "max_context": model.max_context,
        }
        held_out = text_fingerprint(inputs.held_out_texts)
        text = text_fingerprint(inputs.texts)
        elastic = settings.engine == "elastic"
        if not elastic:
            # Compiled, it is another speed, and quality is measured in another way.
            key["engine"] = settings.engine
        return PolicyStore(
            StateDirectory(settings.state_dir),
            PlanFile(inputs.fingerprint, inputs.num_layers),
            plan_key={**key, "text": text, "num_tokens": settings.calibration_tokens}
            if elastic
            else plan_key(settings, inputs.fingerprint, text),
            quality_key={**key, "text": held_out, "num_tokens": settings.quality_tokens},
            speed_key={
                **key,
                "text": held_out,
                "hardware": describe_hardware(),
                "versions": measuring_versions(),
                "max_num_seqs": settings.max_num_seqs,
                "engine_args": settings.engine_args,
            },
        )

    def _save(self, policy: DepthPolicy) -> None:
        assert self._store is not None
        self._store.save(policy)

    def _on_progress(self, progress: Progress) -> None:
        self._progress.advance(_WORK[progress.phase], progress.done, progress.total)

    def _announce(self, service: Service, port: int, metrics_url: str | None) -> None:
        settings, model, policy = self._settings, service.model, service.policy
        address = f"{settings.host}:{port}"
        if self._logs.is_json:
            fields = {"model": model.name, "address": address, "metrics": metrics_url}
            logger.info("serving", extra=with_fields(fields))
            return
        metrics = f"metrics on {metrics_url}" if metrics_url else "no metrics, their port is taken"
        print(
            f"Serving {model.name} ({model.num_layers} layers, {model.dtype}) on {address}; "
            f"{metrics}"
        )
        flag = "" if port == _DEFAULT_PORT else f" --address {address}"
        depth = max(1, model.num_layers * 3 // 4)
        if not policy.any_depth:
            depth = policy.levels[-1].decode_layers
        print(f"Try: fathom generate{flag} --depth {depth} 'The list of'", flush=True)

    async def _reload_on_hangup(self, reload: Reload) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            try:
                await reload.run()
            except Exception:
                logger.exception("the settings could not be read again")

    def _on_hangup(self) -> None:
        if self._logs.has_lost_its_terminal:
            self._on_signal(signal.SIGHUP)
        else:
            self._hangup.set()  # while the server starts, it waits

    def _on_signal(self, number: signal.Signals) -> None:
        if self._serving and not self._stop.is_set():
            self._stop.set()
            return
        # Nothing has been promised to anybody while starting: that is an orderly end.
        self._logs.console.show_cursor(True)
        self._logs.close()
        _end_now(128 + number if self._serving else 0)


def _num_engines(settings: Settings, inputs: Inputs) -> int:
    """Return how many batches run at a time."""
    if settings.engine == "elastic":
        return 1
    return len({level.depths for level in inputs.levels})


def _engine(settings: Settings, inputs: Inputs) -> Engine:
    config: dict[str, Any] = {
        "model": (inputs.quantized or inputs.source).directory,
        "name": inputs.source.name,
        "dtype": settings.dtype,
        "max_context": settings.max_context,
        "max_num_seqs": settings.max_num_seqs,
        "kv_cache_gib": settings.kv_cache_gib,
        "trust_remote_code": settings.trust_remote_code,
        "huge_pages": settings.huge_pages,
        "engine_args": settings.engine_args,
    }
    if settings.engine == "elastic":
        return ElasticEngine(
            ElasticConfig(
                **config,
                compile_layers=settings.compile_layers,
                compile_cache=settings.state_dir / "compiled",
            )
        )
    return DedicatedEngine(
        DedicatedConfig(
            **config,
            memory_shares=settings.memory_shares,
            state_dir=settings.state_dir,
            timeout_seconds=settings.engine_timeout_seconds,
            ranked_model=inputs.source.directory,
        )
    )


def _end_now(code: int) -> None:
    """End this process and the engine's without waiting for anything."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    for child in psutil.wait_procs(children, timeout=_END_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    sys.stdout.flush()
    os._exit(code)
