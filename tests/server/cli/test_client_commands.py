"""Commands that talk to a server: what people see, and with which exit code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.fathom_command import FATHOM, environment
from tests.server.cli.served import NUM_LAYERS, Server


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
    result = server.fathom_in_process("generate", "Once", *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"fathom: {message}")


def test_model_shows_every_depth(server: Server) -> None:
    result = server.fathom("model")
    assert result.returncode == 0, result.stderr
    assert f"LlamaForCausalLM, {NUM_LAYERS} layers" in result.stdout
    both = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in result.stdout.splitlines()
        if line.startswith("│")
    ]
    # Below depths comes a table of what levels write and choose, and among them may be the level
    # that prunes the prompt alone.
    rows = [row for row in both if row[0].isdigit()]
    assert [row[0] for row in rows] == ["5", "4", "3", "2", "1"]
    assert "dense" in {row[0] for row in both}
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


def test_calibrate_by_a_search_in_the_engine_that_serves(server: Server) -> None:
    result = server.fathom("calibrate", "--metric", "greedy_kl", "--max-tokens", "256")
    assert result.returncode == 0, result.stderr
    assert "search: 100 %" in result.stderr
    assert "Ranked by greedy_kl" in result.stdout
    assert "greedy_kl" in result.stdout.splitlines()[2], "the scores have a column"
    result = server.fathom("calibrate", "--metric", "greedy")
    assert result.returncode == 1
    assert "INVALID_ARGUMENT: metric: got 'greedy', allowed: block_influence, " in result.stderr


def test_calibrate_with_a_text_that_is_empty(server: Server, tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.touch()
    result = server.fathom("calibrate", "--text", str(text))
    assert result.returncode == 2
    assert result.stderr.startswith(f"fathom: --text: {text}: empty")


def test_health_of_a_service(server: Server) -> None:
    result = server.fathom_in_process("health", "--service", "fathom.v1.Inference")
    assert (result.returncode, result.stdout) == (0, "SERVING\n")
    result = server.fathom_in_process("health", "--service", "fathom.v1.Unheard")
    assert result.returncode == 1
    assert result.stderr.startswith("fathom: NOT_FOUND")


def test_output_to_a_reader_that_has_seen_enough(server: Server) -> None:
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {FATHOM} generate Once --ignore-eos | head -c 1"],
        capture_output=True,
        text=True,
        env=environment(FATHOM_ADDRESS=server.address),
        check=False,
    )
    assert len(result.stdout) == 1
    assert "Traceback" not in result.stderr
