"""Variables of the environment: which are refused, and which engines get."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from server.config import load_settings
from server.engine.arguments import prepare_environment
from server.engine.environment import check_directories
from server.errors import InvalidArgument
from server.model.inputs import StartError, read_inputs
from tests.fathom_command import fathom

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "VLLM_RPC_BASE_PATH")


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere", "x" * 300])
def test_a_directory_of_no_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: str
) -> None:
    (tmp_path / "file").touch()
    value = str(tmp_path / where)
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument) as caught:
        check_directories()
    assert (caught.value.field, caught.value.value) == (name, value)
    with pytest.raises(StartError, match=f"^{name}: got "):
        read_inputs(load_settings({"state_dir": str(tmp_path / "state")}))


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_directory_that_can_be_made_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "a" / "b ü"))
    check_directories()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(name, "")
    check_directories()


def test_directories_of_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path / "absent"))
    with pytest.raises(InvalidArgument, match="allowed: an existing directory"):
        check_directories()
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(long))
    with pytest.raises(InvalidArgument, match="allowed: 70 bytes or fewer: sockets are made in"):
        check_directories()
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", tempfile.mkdtemp(dir="/tmp"))
    check_directories()


def test_a_long_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    check_directories()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 90)))
    with pytest.raises(InvalidArgument, match=r"TMPDIR: got .* allowed: 70 bytes or fewer"):
        check_directories()


def test_a_server_says_so(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    result = fathom("serve", "--port", "0", "--metrics-port", "0", TMPDIR=str(long))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("fathom: TMPDIR: got ")
    assert "70 bytes or fewer: sockets are made in it" in result.stderr


def test_no_temporary_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(InvalidArgument, match="TMPDIR: got '/proc/nowhere', allowed: a directory"):
        check_directories()


@pytest.mark.parametrize(("given", "expected"), [(None, "spawn"), ("fork", "fork")])
def test_processes_are_spawned_unless_the_operator_wants_it_otherwise(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
    if given is not None:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = given
    prepare_environment()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == expected


def test_threads_of_engines_give_up_a_core_that_others_need() -> None:
    """OpenMP says itself, where it is loaded for engines, how long its threads spin."""
    variables = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    script = (
        "from server.engine import fork_server; fork_server._PRELOADED.clear(); "
        "fork_server.start_fork_server()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=variables | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert "GOMP_SPINCOUNT = '3000'" in ended.stderr, ended.stderr
