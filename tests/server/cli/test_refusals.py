"""Servers that cannot start: what ``fathom serve`` says, and with which exit code."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.conftest import data_path
from tests.fathom_command import fathom_in_process
from tests.server.cli.served import Server
from tests.server.model.checkpoint_copy import copy_of


def refusals(*arguments: str | Path, **variables: str) -> list[str]:
    """Return what a server that cannot start says, one line for each problem."""
    result = fathom_in_process(
        "serve", "--port", "0", "--metrics-port", "0", *arguments, **variables
    )
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("fathom: ")]
    return [line.removeprefix("fathom: ") for line in lines]


def test_all_wrong_settings_are_named() -> None:
    found = refusals("--dtype", "int8", "--grace-seconds", "-1", FATHOM_PROT="1")
    assert found == [
        "unknown variable FATHOM_PROT; did you mean FATHOM_PORT?",
        "dtype: got 'int8', allowed: auto, float32, bfloat16, float16",
        "grace_seconds: got '-1', allowed: 0 or more",
    ]


def test_model_that_does_not_exist() -> None:
    assert refusals("--model", "./no/such/model") == [
        "model: got './no/such/model', allowed: an existing directory or a Hugging Face Hub id"
    ]


def test_model_without_weights(stories_model: Path, tmp_path: Path) -> None:
    model = copy_of(stories_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (problem,) = refusals("--model", model)
    assert problem.startswith(f"model: {model}: holds no weights, allowed:")


def test_model_with_truncated_weights(stories_model: Path, tmp_path: Path) -> None:
    model = copy_of(stories_model, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (problem,) = refusals("--model", model)
    assert problem.startswith(f"model: {weights}")


def test_model_of_another_architecture(stories_model: Path, tmp_path: Path) -> None:
    model = copy_of(stories_model, tmp_path / "model", architectures=["GPT2LMHeadModel"])
    (problem,) = refusals("--model", model)
    assert problem.startswith("model: architecture GPT2LMHeadModel")
    assert "LlamaForCausalLM" in problem


def test_level_deeper_than_the_model(stories_model: Path) -> None:
    (problem,) = refusals("--model", stories_model, "--levels", "full=5,deep=6")
    assert problem == "levels.deep.depth: got 6, allowed: 1 to 5"


def test_default_level_that_is_none(stories_model: Path) -> None:
    (problem,) = refusals("--model", stories_model, "--default-level", "best")
    assert problem.startswith("default_level: got 'best', allowed: one of dense, ")


def test_calibration_text_that_is_empty(stories_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.touch()
    (problem,) = refusals("--model", stories_model, "--calibration", text)
    assert problem.startswith(f"calibration: {text}: empty, allowed:")


def test_quality_text_that_does_not_exist(stories_model: Path) -> None:
    (problem,) = refusals("--model", stories_model, "--quality-text", "./no/such.txt")
    assert problem.startswith("quality_text: './no/such.txt': no such file or directory")


def test_port_in_use(stories_model: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert refusals("--model", stories_model, "--port", str(port)) == [
            f"port: got {port}, allowed: a port that is free on 127.0.0.1 (Address already in use)"
        ]


def test_engine_argument_that_vllm_does_not_know(stories_model: Path) -> None:
    (problem,) = refusals("--model", stories_model, "--engine-args", '{"block_sise": 16}')
    assert problem.startswith("engine_args.block_sise: got 16, allowed:")
    assert "block_size" in problem


def test_plan_of_another_model(server: Server, directory: Path, tmp_path: Path) -> None:
    """The plan that the server keeps is given to a model that differs in one weight."""
    (plan,) = (directory / "state").glob("plan-*.json")
    model = copy_of(data_path("models/stories260K"), tmp_path / "model")
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (problem,) = refusals("--model", model, "--plan", plan)
    assert problem.startswith(f"plan: {plan}: model_fingerprint: the plan is of the model ")
    assert "allowed:" in problem
