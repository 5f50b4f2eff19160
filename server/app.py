"""Puts the parts of a server together, and handles its signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import psutil

from server.access.exposure import allows_anonymous_control, check_exposure, is_loopback
from server.access.state_protection import protect_state
from server.access.state_volume import StateVolume
from server.background import BackgroundTask
from server.config import Settings, warn_of_old_names
from server.engine.base import Engine, RunsVllm
from server.engine.dedicated.engine import DedicatedConfig, DedicatedEngine
from server.engine.elastic.engine import ElasticEngine
from server.engine.fork_server import start_fork_server
from server.model.engine_config import elastic_config, engine_config
from server.model.inputs import Inputs, StartError, auto_rules, read_inputs, refused_as
from server.page_prompts import PagePrompts
from server.reload import Reload, SettingsFile, access_files
from server.rpc.access import Access
from server.rpc.interceptors import Observer
from server.rpc.message_size import default_message_bytes
from server.rpc.server import RpcServer
from server.serving.fair_queue import slots_for
from server.serving.service import Service
from server.startup import Startup
from server.telemetry.http_pages import Probes
from server.telemetry.log_format import with_fields
from server.telemetry.logs import Logs
from server.telemetry.metrics import Metrics
from server.telemetry.metrics_port import MetricsPort
from server.telemetry.progress import ProgressReport
from server.telemetry.prompt_box import PromptBox
from server.telemetry.request_log import log_request
from server.telemetry.tracing import open_tracing
from server.version import VERSION

if TYPE_CHECKING:
    from server.openai.server import HttpServer

_DEFAULT_PORT = 50051
_END_SECONDS = 2.0

logger = logging.getLogger(__name__)


def serve(settings: Settings, read_again: Callable[[], Settings]) -> None:
    """Serve until SIGTERM or SIGINT; on SIGHUP use the settings that ``read_again`` returns.

    Raises:
        StartError: the server cannot start with these settings.
    """
    logs = Logs(settings.log_level, settings.log_format)
    warn_of_old_names(settings.old_names)
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

    async def run(self) -> None:
        """Serve until a signal, then let what runs finish. A second signal ends it at once."""
        settings = self._settings
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._on_hangup)
        with refused_as("host"):
            check_exposure(settings)
            protect_state(settings.state_dir)
        if settings.trust_remote_code:
            logger.warning(
                "trust_remote_code is on: code that comes with the model runs with all rights "
                "of this server"
            )
        state_volume = StateVolume(settings.state_dir)
        await asyncio.to_thread(state_volume.look)
        started = time.monotonic()
        inputs = await asyncio.to_thread(read_inputs, settings)
        inputs_seconds = time.monotonic() - started
        async with AsyncExitStack() as stack:
            metrics = Metrics()
            with refused_as("clients"):
                access = Access(
                    access_files(settings),
                    metrics,
                    anonymous_control=allows_anonymous_control(settings),
                )
            with refused_as("metrics_port"):
                probes = Probes()
                metrics_port = MetricsPort(
                    metrics, settings.metrics_host, settings.metrics_port, probes
                )
            stack.callback(metrics_port.close)
            engine = _engine(settings, inputs)
            service = make_service(settings, engine, metrics)
            observers: list[Observer] = [log_request]
            with refused_as("otlp_endpoint"):
                tracing = open_tracing(settings.otlp_endpoint, VERSION)
            if tracing is not None:
                stack.callback(tracing.close)
                observers.append(tracing.observer(lambda: service.model_name))
            rpc_server = make_rpc_server(settings, inputs, service, access, observers)
            with refused_as("port"):
                await rpc_server.start()
            probes.not_ready = rpc_server.not_ready
            probes.warnings = lambda: [*filter(None, [state_volume.problem]), *access.problems]
            observers = [rpc_server.count, *observers]
            http_server = make_http_server(
                settings, inputs, service, access, observers, rpc_server.not_ready
            )
            if http_server is not None:
                with refused_as("http_port"):
                    await http_server.start()
            page_prompts = PagePrompts(service, access.authenticator, observers)
            probes.prompt_box = PromptBox(probes.loop, page_prompts.backend(settings))
            start_fork_server()  # what it takes long for is done by the time it is needed
            stack.push_async_callback(engine.shutdown)
            stack.push_async_callback(service.close)
            stack.push_async_callback(rpc_server.stop)
            if http_server is not None:
                stack.push_async_callback(http_server.stop)
            for name, work in (
                ("the watch on certificates and clients", access.follow),
                ("the wait for the metrics port", metrics_port.follow),
                ("the watch on the volume of the state", state_volume.follow),
            ):
                task = BackgroundTask(name, work)
                task.start()
                stack.push_async_callback(task.stop)
            metrics.set_startup("inputs", inputs_seconds)
            with self._progress:
                startup = Startup(settings, inputs, engine, service, self._progress)
                await startup.run(lambda: _open(http_server, engine))
            self._serving = True
            http_url = None if http_server is None else http_server.url
            self._announce(service, rpc_server.port, metrics_port.url, http_url)
            if startup.healer is not None:
                healing = BackgroundTask("the healing of levels", startup.healer.run)
                healing.start()
                stack.push_async_callback(healing.stop)
            read_again = self._read_again
            if settings.config is not None:
                file = SettingsFile(settings.config, read_again)
                read_again = file.read
                watching = BackgroundTask(
                    "what watches the settings' file", lambda: file.follow(self._hangup)
                )
                watching.start()
                stack.push_async_callback(watching.stop)
            reload = Reload(
                settings,
                read_again,
                access=access,
                service=service,
                set_log_level=self._logs.set_level,
            )
            probes.warnings = lambda: [
                *filter(None, [reload.problem, state_volume.problem, service.repair.problem]),
                *access.problems,
            ]
            reloading = BackgroundTask(
                "the reload of settings", lambda: reload.follow(self._hangup)
            )
            reloading.start()
            stack.push_async_callback(reloading.stop)
            await self._stop.wait()
            if settings.drain_delay_seconds:
                logger.info(
                    "stopping; requests are taken for another %g s, and health is NOT_SERVING",
                    settings.drain_delay_seconds,
                )
                await rpc_server.leave()
                await asyncio.sleep(settings.drain_delay_seconds)
            logger.info("stopping; requests that run have %g s", settings.grace_seconds)
            await service.drain(for_good=True)

    def _announce(
        self, service: Service, port: int, metrics_url: str | None, http_url: str | None
    ) -> None:
        settings, model, policy = self._settings, service.model, service.policy
        address = f"{settings.host}:{port}"
        if self._logs.is_json:
            fields = {"model": model.name, "address": address, "metrics": metrics_url}
            if http_url is not None:
                fields["http"] = http_url
            logger.info("serving", extra=with_fields(fields))
            return
        metrics = f"metrics on {metrics_url}" if metrics_url else "no metrics, their port is taken"
        http = f"OpenAI's API on {http_url}; " if http_url else ""
        print(
            f"Serving {model.name} ({model.num_layers} layers, {model.dtype}) on {address}; "
            f"{http}{metrics}"
        )
        flag = "" if port == _DEFAULT_PORT else f" --address {address}"
        depth = max(1, model.num_layers * 3 // 4)
        if not policy.any_depth:
            depth = policy.levels[-1].decode_layers
        print(f"Try: fathom generate{flag} --depth {depth} 'The list of'", flush=True)

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


def make_service(settings: Settings, engine: Engine, metrics: Metrics) -> Service:
    """Return the service that the settings describe, of an engine that has not been started."""
    return Service(
        engine,
        metrics,
        max_running=slots_for(settings.max_num_seqs),
        max_waiting=settings.max_waiting,
        max_waiting_tokens=settings.max_waiting_tokens,
        max_buffered_tokens=settings.max_buffered_tokens,
        share_prefix_cache=settings.share_prefix_cache,
        engine_timeout_seconds=settings.engine_timeout_seconds,
        engine_stall_seconds=settings.engine_stall_seconds,
        auto_rules=auto_rules(settings),
        grace_seconds=settings.grace_seconds,
        version=VERSION,
        checks_results=True,
    )


def make_rpc_server(
    settings: Settings,
    inputs: Inputs,
    service: Service,
    access: Access,
    observers: Sequence[Observer] = (),
) -> RpcServer:
    """Return the gRPC server that the settings describe; it does not listen yet."""
    max_context = settings.max_context or inputs.source.max_context()
    return RpcServer(
        service,
        settings.host,
        settings.port,
        max_message_bytes=settings.max_message_bytes or default_message_bytes(max_context),
        max_concurrent_streams=settings.max_streams_per_connection,
        max_connection_age_seconds=settings.max_connection_seconds,
        tls=access.tls,
        authenticator=access.authenticator,
        observers=observers,
    )


def make_http_server(
    settings: Settings,
    inputs: Inputs,
    service: Service,
    access: Access,
    observers: Sequence[Observer],
    not_ready: Callable[[], str],
) -> HttpServer | None:
    """Return the server of OpenAI's API that the settings describe; None: they want none."""
    if settings.http_port is None:
        return None
    # Imported late: it takes uvicorn.
    from server.openai.server import HttpServer
    from server.openai.tls import HttpTls

    tls = None
    if access.certificates is not None:
        tls = HttpTls(access.certificates)
        access.add_follower(tls.install)
    max_context = settings.max_context or inputs.source.max_context()
    return HttpServer(
        service,
        settings.host,
        settings.http_port,
        authenticator=access.authenticator,
        observers=observers,
        not_ready=not_ready,
        max_body_bytes=settings.max_message_bytes or default_message_bytes(max_context),
        only_loopback=is_loopback(settings.host),
        allow_origins=settings.http_allow_origins,
        tls=tls,
        tool_parser=settings.tool_parser,
    )


async def _open(http_server: HttpServer | None, engine: Engine) -> None:
    """Open the HTTP server, if there is one, before the service says that it serves."""
    if http_server is not None:
        assert isinstance(engine, RunsVllm)
        with refused_as("http_port", Exception):  # vLLM's classes read the model
            await http_server.open(engine, engine.model.name)


def _engine(settings: Settings, inputs: Inputs) -> Engine:
    model, name = (inputs.quantized or inputs.source).directory, inputs.source.name
    if settings.engine == "elastic":
        return ElasticEngine(elastic_config(settings, model, name))
    return DedicatedEngine(
        DedicatedConfig(
            **engine_config(settings, model, name),
            memory_shares=settings.memory_shares,
            state_dir=settings.state_dir,
            timeout_seconds=settings.engine_timeout_seconds,
            stall_seconds=settings.engine_stall_seconds,
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
