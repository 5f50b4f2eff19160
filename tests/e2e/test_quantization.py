"""A server that quantizes its model when it starts."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.rpc.client import CallError
from tests.e2e.calls import greedy_request
from tests.e2e.running_server import PATIENCE, RunningServer, running_server, until
from tests.e2e.test_bad_starts import serve
from tests.fathom_command import fathom_in_process
from tests.pruning.quantization.small_model import runs_quantized


def workers_of(server: RunningServer) -> list[psutil.Process]:
    assert server.process.poll() is None, server.log
    return [child for child in server.children() if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return any(word.endswith("quantization.worker") for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def health(server: RunningServer) -> str | None:
    try:
        with server.client(timeout=5.0) as client:
            return client.health()
    except CallError:
        return None


@runs_quantized
def test_quantized_at_start_after_a_start_that_was_killed(small: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    settings: dict[str, Any] = {
        "model": small,
        "dtype": "auto",
        "quantize": "gptq-4bit",
        "calibration_tokens": 512,
        "state_dir": state,
    }
    killed = RunningServer(tmp_path / "killed", **settings)
    try:
        (worker,) = until(lambda: workers_of(killed), lambda: killed.log)
        assert until(lambda: health(killed), lambda: killed.log) == "NOT_SERVING"
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait()
        assert not psutil.wait_procs([worker], timeout=PATIENCE)[1]
    finally:
        killed.close()
    assert not list(state.glob("quantized-*.json"))

    with running_server(tmp_path / "first", **settings) as server, server.client() as client:
        assert "Quantizing the layers: 100 %" in server.log
        assert server.scrape().by_label("fathom_startup_seconds", "phase")["quantize"] > 0
        model = client.get_model()
        assert (model.num_layers, model.dtype) == (3, "bfloat16")
        assert "gptq" in model.quantization
        for depth in (3, 2, 1):
            served = client.generate(greedy_request("Return the", 8, depth=depth)).served
            assert (served.prefill_layers, served.decode_layers) == (depth, depth)
    assert not list(state.glob("*.partial-*"))

    with running_server(tmp_path / "second", **settings) as server:
        assert "Quantizing the layers" not in server.log
        assert "Ranking the layers" not in server.log


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float32"}, "fathom: dtype: got 'float32', allowed: auto, bfloat16 or float16"),
        ({"order": "prune-then-quantize"}, "fathom: order: got 'prune-then-quantize', allowed: "),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    given = {"dtype": "auto", "quantize": "gptq-4bit", **settings}
    result = serve(tmp_path, fathom_in_process, **given)
    assert result.returncode == 2
    assert message in result.stderr
