"""The ``fathom`` command without a server: what people see, and with which exit code."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from typer.main import get_command

from server.cli import app
from server.config import OLD_NAMES, Settings
from tests.fathom_command import FATHOM, environment, fathom, free_ports


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["serve", "--help"],
        ["bench", "--help"],
        ["report", "--help"],
        ["--version"],
        ["generate", "x"],
        ["health"],
    ],
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
    (port,) = free_ports(1)
    variables = environment(FATHOM_ADDRESS=f"127.0.0.1:{port}")
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=variables, check=False
    )
    assert result.returncode == 0, result.stderr


def test_every_setting_has_a_flag() -> None:
    serve = get_command(app).get_command(None, "serve")  # type: ignore[attr-defined]
    flags = {option for parameter in serve.params for option in parameter.opts}
    wanted = {f"--{name.replace('_', '-')}" for name in [*Settings.model_fields, *OLD_NAMES]}
    assert flags == wanted


def test_old_names_of_settings_are_not_shown() -> None:
    help_text = fathom("serve", "--help").stdout
    for old, present in OLD_NAMES.items():
        assert f"--{old.replace('_', '-')} " not in help_text
        assert f"--{present.replace('_', '-')} " in help_text


def test_version() -> None:
    result = fathom("--version")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", result.stdout)


def test_no_server_is_explained() -> None:
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
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
