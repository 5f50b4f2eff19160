"""The ``fathom`` command, as processes: what people see, and with which exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.main import get_command

from pruning.checkpoint import read_config
from server.cli import app
from server.config import Settings
from tests.conftest import data_path

FATHOM = Path(sys.executable).with_name("fathom")
# An engine starts in half a minute on a busy machine; this is for one that never does.
START_SECONDS = 200.0
NUM_LAYERS = 5


def environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FATHOM_")}
    return {**inherited, "COLUMNS": "160"}


def fathom(
    *arguments: str | Path, stdin: str = "", variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FATHOM, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**environment(), **(variables or {})},
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A ``fathom serve`` in a process group of its own, as in a terminal."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    def wait_until_serving(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while fathom("health", "--address", self.address).returncode != 0:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def fathom(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return fathom(*arguments, stdin=stdin, variables={"FATHOM_ADDRESS": self.address})

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and what was printed."""
        printed, _ = self.process.communicate(timeout=60)
        return self.process.returncode, printed

    def kill(self) -> None:
        """End it and what it has started, where that has not been done."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def start_server(model: Path, directory: Path, *arguments: str) -> Server:
    port = free_port()
    log = directory / f"log-{port}"
    command: list[str | Path] = [
        FATHOM,
        "serve",
        "--model",
        model,
        "--port",
        str(port),
        "--metrics-port",
        "0",
    ]
    limits = ["--kv-cache-gib", "0.25", "--max-num-seqs", "16", "--calibration-tokens", "1024"]
    state: list[str | Path] = ["--quality-tokens", "1024", "--state-dir", directory / "state"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *limits, *state, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment(),
            process_group=0,
        )
    return Server(process, f"127.0.0.1:{port}", log)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(stories_model: Path, directory: Path) -> Iterator[Server]:
    started = start_server(stories_model, directory)
    try:
        started.wait_until_serving()
        yield started
    finally:
        started.kill()


# Without a server


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["--version"], ["generate", "x"], ["health"]]
)
def test_light_commands_load_no_heavy_packages(arguments: list[str]) -> None:
    script = f"""
import sys
sys.argv = ["fathom", *{arguments!r}]
from server.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {{"torch", "transformers", "vllm"}} & set(sys.modules)
assert not heavy, heavy
"""
    variables = {**environment(), "FATHOM_ADDRESS": f"127.0.0.1:{free_port()}"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=variables, check=False
    )
    assert result.returncode == 0, result.stderr


def test_every_setting_has_a_flag() -> None:
    serve = get_command(app).get_command(None, "serve")  # type: ignore[attr-defined]
    flags = {option for parameter in serve.params for option in parameter.opts}
    wanted = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    assert flags == wanted


def test_version() -> None:
    result = fathom("--version")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", result.stdout)


def test_no_server_is_explained() -> None:
    address = f"127.0.0.1:{free_port()}"
    result = fathom("generate", "x", "--address", address)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"fathom: UNAVAILABLE: no server answers at {address}")
    assert "fathom serve" in line
    assert "Traceback" not in result.stderr


def test_depths_exclude_each_other() -> None:
    result = fathom("generate", "x", "--depth", "3", "--level", "fast")
    assert result.returncode == 2
    assert "--depth and --level exclude each other" in result.stderr


def test_prompt_that_is_no_text() -> None:
    result = subprocess.run(
        [FATHOM, "generate", b"x\xff"], capture_output=True, env=environment(), check=False
    )
    assert result.returncode == 2
    assert b"is not UTF-8" in result.stderr


def refusals(*arguments: str | Path, variables: dict[str, str] | None = None) -> list[str]:
    """Return what a server that cannot start says, one line for each problem."""
    result = fathom("serve", "--port", "0", "--metrics-port", "0", *arguments, variables=variables)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("fathom: ")]
    return [line.removeprefix("fathom: ") for line in lines]


def test_all_wrong_settings_are_named() -> None:
    found = refusals("--dtype", "int8", "--grace-seconds", "-1", variables={"FATHOM_PROT": "1"})
    assert found == [
        "unknown variable FATHOM_PROT; did you mean FATHOM_PORT?",
        "dtype: got 'int8', allowed: auto, float32, bfloat16, float16",
        "grace_seconds: got '-1', allowed: 0 or more",
    ]


def test_model_that_does_not_exist() -> None:
    assert refusals("--model", "./no/such/model") == [
        "model: got './no/such/model', allowed: an existing directory or a Hugging Face Hub id"
    ]


def copy_of(model: Path, directory: Path, **changes: object) -> Path:
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = {**read_config(model), **changes}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


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


# With a server


def test_generate_prints_text_and_served_depth(server: Server) -> None:
    texts = set()
    for depth in (5, 4, 3):
        result = server.fathom(
            "generate", "Once upon a time", "--depth", str(depth), "--max-tokens", "16",
            "--temperature", "0", "--ignore-eos",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert re.match(rf"\[depth {depth}, requested; 16 tokens in ", result.stderr)
        texts.add(result.stdout)
    assert len(texts) == 3


def test_generate_at_the_default_level(server: Server) -> None:
    result = server.fathom("generate", "Once", "--max-tokens", "1")
    assert result.stderr.startswith(f"[depth {NUM_LAYERS}, default; 1 tokens in ")


def test_generate_with_a_pruned_prompt(server: Server) -> None:
    result = server.fathom(
        "generate", "Once", "--depth", "5", "--prefill-depth", "3", "--max-tokens", "2"
    )
    assert result.stderr.startswith("[depth 5 (prompt: 3), requested; ")


def test_prompt_from_stdin(server: Server) -> None:
    options = ["--max-tokens", "8", "--temperature", "0"]
    from_stdin = server.fathom("generate", "-", *options, stdin="Once upon a time")
    assert from_stdin.returncode == 0
    given = server.fathom("generate", "Once upon a time", *options)
    assert from_stdin.stdout == given.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depth", "0"], "INVALID_ARGUMENT: depth.layers: got 0, allowed: 1 to 5"),
        (["--depth", "6"], "INVALID_ARGUMENT: depth.layers: got 6, allowed: 1 to 5"),
        (["--prune-ratio", "1"], "INVALID_ARGUMENT: depth.prune_ratio: got 1.0, allowed: "),
        (["--prune-ratio", "nan"], "INVALID_ARGUMENT: depth.prune_ratio: got nan, allowed: "),
        (["--level", "best"], "NOT_FOUND: no level 'best'; the levels are dense, "),
        (["--max-tokens", "0"], "INVALID_ARGUMENT: stop.max_tokens: got 0, allowed: "),
        (["--temperature", "-1"], "INVALID_ARGUMENT: sampling.temperature: got -1.0, allowed: "),
        (["--chat"], "FAILED_PRECONDITION: "),
    ],
)
def test_refused_request(server: Server, arguments: list[str], message: str) -> None:
    result = server.fathom("generate", "Once", *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"fathom: {message}")


def test_model_shows_every_depth(server: Server) -> None:
    result = server.fathom("model")
    assert result.returncode == 0, result.stderr
    assert f"LlamaForCausalLM, {NUM_LAYERS} layers" in result.stdout
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in result.stdout.splitlines()
        if line.startswith("│")
    ]
    assert [row[0] for row in rows] == ["5", "4", "3", "2", "1"]
    assert rows[0][1] == "dense *"
    assert rows[0][3:5] == ["100.0%", "0.000"]
    assert rows[0][6] == "1.00x"
    perplexities = [float(row[2].split(" ± ")[0]) for row in rows]
    assert min(perplexities) == perplexities[0]


def test_calibrate_prints_the_plan_and_the_server_serves_on(server: Server, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl who liked to play. " * 40)
    result = server.fathom("calibrate", "--text", str(text), "--max-tokens", "256")
    assert result.returncode == 0, result.stderr
    assert "importance: 100 %" in result.stderr
    order = result.stdout.splitlines()[-1].removeprefix("Removal order: ")
    assert sorted(map(int, order.split(", "))) == list(range(NUM_LAYERS))
    assert server.fathom("generate", "Once", "--depth", "3").returncode == 0


def test_calibrate_with_a_text_that_is_empty(server: Server, tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.touch()
    result = server.fathom("calibrate", "--text", str(text))
    assert result.returncode == 2
    assert result.stderr.startswith(f"fathom: --text: {text}: empty")


def test_health_of_a_service(server: Server) -> None:
    result = server.fathom("health", "--service", "fathom.v1.Inference")
    assert (result.returncode, result.stdout) == (0, "SERVING\n")
    result = server.fathom("health", "--service", "fathom.v1.Unheard")
    assert result.returncode == 1
    assert result.stderr.startswith("fathom: NOT_FOUND")


def test_output_to_a_reader_that_has_seen_enough(server: Server) -> None:
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {FATHOM} generate Once --ignore-eos | head -c 1"],
        capture_output=True,
        text=True,
        env={**environment(), "FATHOM_ADDRESS": server.address},
        check=False,
    )
    assert len(result.stdout) == 1
    assert "Traceback" not in result.stderr


# From start to end


def test_restart_and_ctrl_c(server: Server, stories_model: Path, directory: Path) -> None:
    """A start with what the first one kept; Ctrl-C sends SIGINT to the engine's process, too."""
    again = start_server(stories_model, directory)
    try:
        deadline = time.monotonic() + START_SECONDS
        while (starting := again.fathom("health")).stdout == "":
            assert time.monotonic() < deadline
        assert (starting.returncode, starting.stdout) == (1, "NOT_SERVING\n")
        again.wait_until_serving()
        log = again.log.read_text()
        assert "Ranking the layers" not in log
        assert "Measuring quality" not in log

        generating = subprocess.Popen(
            [FATHOM, "generate", "Once", "--max-tokens", "480", "--ignore-eos"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment(), "FATHOM_ADDRESS": again.address},
        )
        assert generating.stdout is not None
        first = generating.stdout.read(1)  # it runs
        os.killpg(again.process.pid, signal.SIGINT)
        rest, summary = generating.communicate(timeout=100)
        assert generating.returncode == 0, summary
        assert "480 tokens" in summary
        assert first + rest
        code, printed = again.end()
        assert code == 0
        assert printed.splitlines()[0].startswith(f"Serving {stories_model} (5 layers, ")
        assert f"on {again.address};" in printed
        assert "Traceback" not in again.log.read_text()
    finally:
        again.kill()


def test_signal_while_starting(stories_model: Path, tmp_path: Path) -> None:
    starting = start_server(stories_model, tmp_path)
    try:
        deadline = time.monotonic() + START_SECONDS
        while starting.fathom("health").stdout == "":
            assert time.monotonic() < deadline
        starting.process.terminate()
        assert starting.end() == (0, "")
    finally:
        starting.kill()


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
