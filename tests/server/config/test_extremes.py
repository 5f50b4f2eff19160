"""Every number that may be set, at both ends of what is allowed: the server serves with it."""

from __future__ import annotations

import asyncio
import io
import sys
import typing
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Gt, Le
from rich.console import Console

from server.app import make_rpc_server, make_service
from server.config import Settings, load_settings
from server.depth.levels import spec_of
from server.model.inputs import read_inputs
from server.reload import access_files
from server.rpc.access import Access
from server.rpc.client import AsyncClient
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2
from server.startup import Startup
from server.telemetry.metrics import Metrics
from server.telemetry.metrics_port import MetricsPort
from server.telemetry.progress import ProgressReport
from tests.server.rpc.conftest import LEVELS
from tests.server.rpc.toy_engine import NUM_LAYERS, ToyEngine

# Another program may have it, and a test may not be allowed to.
_NOT_TRIED = {("port", "65535"), ("metrics_port", "65535")}
# What else must be set for a setting to be allowed.
_WITH = {"heal_intermediate_size": {"heal_kind": "gated-mlp"}}


def ends() -> Iterator[tuple[str, str]]:
    """Yield the names of settings that are numbers, each with its smallest and largest value."""
    for name, field in Settings.model_fields.items():
        kind, metadata = field.annotation, list(field.metadata)
        for inner in typing.get_args(kind) if typing.get_origin(kind) is not dict else ():
            if typing.get_origin(inner) is Annotated:
                kind, *more = typing.get_args(inner)
                metadata += more
            elif inner is not type(None):
                kind = inner
        if kind in (int, float):
            bounds = {type(item): item for item in metadata}
            low, high = _ends(kind, bounds)
            yield from {(name, low), (name, high)} - _NOT_TRIED


def _ends(kind: object, bounds: dict[type, Any]) -> tuple[str, str]:
    largest = str(10**30) if kind is int else repr(sys.float_info.max)
    high = repr(bounds[Le].le) if Le in bounds else largest
    if Gt in bounds:
        return repr(5e-324), high  # the smallest float above zero
    return repr(bounds[Ge].ge), high


def test_the_ends_are_found() -> None:
    found = set(ends())
    assert {("quality_tokens", "64"), ("quality_tokens", str(10**30))} <= found
    assert {("max_connection_seconds", "1"), ("kv_cache_gib", "5e-324")} <= found
    assert ("auto_min_agreement", "1") in found
    assert len({name for name, _ in found}) > 20


@pytest.mark.parametrize(("name", "value"), sorted(ends()))
async def test_the_server_serves(
    name: str, value: str, tmp_path: Path, stories_model: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 20)
    paths = {"model": stories_model, "state_dir": tmp_path, "calibration": text}
    flags = {key: str(path) for key, path in {**paths, "quality_text": text}.items()}
    flags |= {"port": "0", "metrics_port": "0", **_WITH.get(name, {})}
    settings = load_settings({**flags, name: value})
    inputs = await asyncio.to_thread(read_inputs, settings)
    inputs = replace(
        inputs, num_layers=NUM_LAYERS, levels=tuple(map(spec_of, LEVELS)), default_level="fast"
    )
    engine, metrics = ToyEngine(), Metrics()
    async with AsyncExitStack() as stack:
        access = Access(access_files(settings), metrics)
        metrics_port = MetricsPort(metrics, settings.metrics_host, settings.metrics_port)
        stack.callback(metrics_port.close)
        service = make_service(settings, engine, metrics)
        stack.push_async_callback(service.close)
        rpc = make_rpc_server(settings, inputs, service, access)
        await rpc.start()
        stack.push_async_callback(rpc.stop)
        progress = ProgressReport(Console(file=io.StringIO()))
        await Startup(settings, inputs, engine, service, progress).run()
        async with AsyncClient(f"127.0.0.1:{rpc.port}") as client:
            request = inference_pb2.GenerateRequest(
                prompt="x",
                depth=common_pb2.Depth(auto=common_pb2.Auto()),
                stop=inference_pb2.StopConditions(max_tokens=2, ignore_eos=True),
            )
            response = await client.inference.Generate(request)
            assert response.finish_info.usage.num_generated_tokens == 2
            status = await client.control.GetStatus(control_pb2.GetStatusRequest())
            assert status.state == control_pb2.GetStatusResponse.STATE_SERVING
        assert await service.drain() == 0
