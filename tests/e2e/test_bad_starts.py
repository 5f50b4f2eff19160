"""Servers that cannot start: the exit code, and one line that names the fault."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StableLmConfig

from pruning.plan import Plan
from server.engine.elastic.architectures import ELASTIC_ARCHITECTURES
from server.model.source import DEMO_MODEL
from tests.e2e.calls import assert_generates
from tests.e2e.running_server import SMALL, RunningServer, flags
from tests.fathom_command import fathom, fathom_in_process, free_ports

LOADING = "Loading the model"

# Makes something bad in the directory; returns the settings that name it, and texts of the error.
Trouble = Callable[[Path], tuple[dict[str, object], list[str]]]


def copied_model(directory: Path) -> Path:
    return Path(
        shutil.copytree(DEMO_MODEL, directory / "model", ignore=shutil.ignore_patterns("*.py*"))
    )


def model_without_weights(directory: Path) -> tuple[dict[str, object], list[str]]:
    model = copied_model(directory)
    (model / "model.safetensors").unlink()
    return {"model": model}, [f"model: {model}: holds no weights, allowed: ", "*.safetensors"]


def truncated_weights(directory: Path) -> tuple[dict[str, object], list[str]]:
    model = copied_model(directory)
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    return {"model": model}, [f"model: {weights}: truncated", str(len(content) // 2)]


def truncated_header(directory: Path) -> tuple[dict[str, object], list[str]]:
    model = copied_model(directory)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    return {"model": model}, [f"model: {weights}: truncated", "100 bytes"]


def empty_weights(directory: Path) -> tuple[dict[str, object], list[str]]:
    model = copied_model(directory)
    weights = model / "model.safetensors"
    weights.write_bytes(b"")
    return {"model": model}, [f"model: {weights}: not a safetensors file (0 bytes)"]


def directory_that_is_not_there(directory: Path) -> tuple[dict[str, object], list[str]]:
    model = directory / "nowhere"
    return {"model": model}, [f"model: got '{model}', allowed: an existing directory"]


def plan_of_another_model(directory: Path) -> tuple[dict[str, object], list[str]]:
    path = directory / "plan.json"
    Plan(
        removal_order=tuple(range(16)),
        scores=(0.1,) * 16,
        stderrs=(0.01,) * 16,
        model_fingerprint="sha256:of-another-model",
        text_fingerprint="sha256:of-a-text",
        num_tokens=1000,
        versions={},
        created_at=1.7e9,
    ).save(path)
    return {"plan": path}, ["plan: ", "model_fingerprint", "sha256:of-another-model"]


def plan_that_is_damaged(directory: Path) -> tuple[dict[str, object], list[str]]:
    path = directory / "plan.json"
    path.write_text('{"format_version": 1, "removal_order": [0, 1')
    return {"plan": path}, [f"plan: {path}"]


def empty_calibration_text(directory: Path) -> tuple[dict[str, object], list[str]]:
    path = directory / "empty.txt"
    path.write_text(" \n")
    return {"calibration": path}, [f"calibration: {path}"]


def calibration_text_that_is_not_there(directory: Path) -> tuple[dict[str, object], list[str]]:
    path = directory / "nowhere.txt"
    return {"calibration": path}, ["calibration: ", str(path)]


def quality_text_that_is_no_text(directory: Path) -> tuple[dict[str, object], list[str]]:
    path = directory / "binary.txt"
    path.write_bytes(b"\xff\xfe\x00" * 100)
    return {"quality_text": path}, [f"quality_text: {path}"]


def unknown_key_in_the_file(directory: Path) -> tuple[dict[str, object], list[str]]:
    path = directory / "settings.yaml"
    path.write_text("levles:\n  fast: 8\n")
    return {"config": path}, ["unknown setting 'levles'", "did you mean levels?"]


def level_that_the_model_does_not_have(directory: Path) -> tuple[dict[str, object], list[str]]:
    return {"levels": "fast=17"}, ["levels.fast.depth: got 17, allowed: 1 to 16"]


def impossible_port(directory: Path) -> tuple[dict[str, object], list[str]]:
    return {"port": 65536}, ["port: got '65536', allowed: 0 to 65535"]


def address_that_others_can_reach(directory: Path) -> tuple[dict[str, object], list[str]]:
    return {"host": "0.0.0.0"}, [
        "host: got '0.0.0.0', allowed: a loopback address",
        "allow_plaintext",
        "allow_anonymous",
    ]


def state_directory_that_others_can_write_to(
    directory: Path,
) -> tuple[dict[str, object], list[str]]:
    state = directory / "shared"
    state.mkdir()
    state.chmod(0o777)
    return {"state_dir": state}, [
        f"state_dir: got '{state}', allowed: a directory that only the server's user and root "
        "can write to",
        f"other users can write to {state} (mode 0777)",
        f"chmod go-w {state}",
    ]


def architecture_that_is_not_supported(directory: Path) -> tuple[dict[str, object], list[str]]:
    model = directory / "stablelm"
    torch.manual_seed(0)
    config = StableLmConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    auto: Any = AutoModelForCausalLM
    auto.from_config(config).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, model)
    return {"model": model}, ["model: ", "StableLmForCausalLM", *ELASTIC_ARCHITECTURES]


TROUBLES: list[Trouble] = [
    model_without_weights,
    truncated_weights,
    truncated_header,
    empty_weights,
    directory_that_is_not_there,
    plan_of_another_model,
    plan_that_is_damaged,
    empty_calibration_text,
    calibration_text_that_is_not_there,
    quality_text_that_is_no_text,
    unknown_key_in_the_file,
    level_that_the_model_does_not_have,
    impossible_port,
    address_that_others_can_reach,
    state_directory_that_others_can_write_to,
    architecture_that_is_not_supported,
]


Command = Callable[..., subprocess.CompletedProcess[str]]


def serve(
    directory: Path, command: Command = fathom_in_process, **settings: object
) -> subprocess.CompletedProcess[str]:
    """Start a server that is expected not to get anywhere."""
    port, metrics_port = free_ports(2)
    chosen = {
        **SMALL,
        "port": port,
        "metrics_port": metrics_port,
        "state_dir": directory / "state",
        **settings,
    }
    return command("serve", *flags(chosen))


def assert_refused(result: subprocess.CompletedProcess[str], *expected: str) -> None:
    """The line is the only one, so no engine has been started: that is logged."""
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("fathom: ")
    for part in expected:
        assert part in line


@pytest.mark.parametrize("trouble", TROUBLES, ids=[each.__name__ for each in TROUBLES])
def test_it_is_refused_before_an_engine_is_started(trouble: Trouble, tmp_path: Path) -> None:
    settings, expected = trouble(tmp_path)
    assert_refused(serve(tmp_path, fathom_in_process, **settings), *expected)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("trouble", [unknown_key_in_the_file, truncated_weights])
def test_a_process_of_its_own_ends_the_same_way(trouble: Trouble, tmp_path: Path) -> None:
    """One is refused with the settings, the other one once the model is read."""
    settings, expected = trouble(tmp_path)
    assert_refused(serve(tmp_path, fathom, **settings), *expected)
    assert not (tmp_path / "state").exists()


def test_the_start_of_an_engine_would_be_seen(demo_server: RunningServer) -> None:
    assert LOADING in demo_server.log


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_in_use(taken_port: int, tmp_path: Path) -> None:
    result = serve(tmp_path, fathom, port=taken_port)
    assert_refused(result, f"port: got {taken_port}, allowed: a port that is free on 127.0.0.1")


def test_one_port_for_both(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    result = serve(tmp_path, port=port, metrics_port=port)
    assert_refused(result, f"metrics_port: got {port}, allowed: another port than 'port' has")
    # Another name of the same address.
    result = serve(tmp_path, port=port, metrics_port=port, metrics_host="0.0.0.0")
    assert_refused(result, f"port: got {port}, allowed: a port that is free on 127.0.0.1")


def test_the_port_of_another_server(demo_server: RunningServer, tmp_path: Path) -> None:
    port = demo_server.port
    assert_refused(serve(tmp_path, port=port), f"port: got {port}, allowed: ")
    with demo_server.client() as client:
        assert_generates(client)


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    result = serve(tmp_path, max_context=1, dtype="float8")
    assert result.returncode == 2
    lines = sorted(result.stderr.splitlines())
    assert [line.split(" got ")[0] for line in lines] == ["fathom: dtype:", "fathom: max_context:"]


@pytest.mark.parametrize(
    ("command", "settings", "expected"),
    [
        (
            fathom,
            {"engine_args": json.dumps({"kv_cash_dtype": "auto"})},
            ["engine_args.kv_cash_dtype: got 'auto'", "such as kv_cache_dtype"],
        ),
        (fathom_in_process, {"max_context": 4096}, ["max_context", "4096", "512"]),
    ],
    ids=["unknown engine argument", "context that is too long"],
)
def test_what_only_the_engine_can_tell(
    command: Command, settings: dict[str, object], expected: list[str], tmp_path: Path
) -> None:
    """vLLM is imported for it, so there are lines of progress before the last."""
    result = serve(tmp_path, command, **settings)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert "Traceback" not in result.stderr
    problems = [line for line in result.stderr.splitlines() if line.startswith("fathom: ")]
    (line,) = problems
    for part in expected:
        assert part in line
