"""The Dockerfile and the compose file, as far as they can be checked without an image."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.plain_rules import PATH as PLAIN_RULES
from deploy.plain_rules import as_yaml
from server.config import load_settings
from tests.deploy.rendering import DEPLOY, ROOT
from tests.deploy.test_rules import program

DOCKERFILE = DEPLOY / "Dockerfile"
COMPOSE = DEPLOY / "compose.yaml"


def test_the_dockerfile_passes_hadolint() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == ""
    assert result.returncode == 0, result.stderr


def test_what_the_dockerfile_copies_is_in_its_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
        for source in line.split()
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    assert not any(fnmatch.fnmatch(source, "*.env") for source in copied)


def test_the_dockerfile_installs_the_torch_of_the_makefile() -> None:
    torch = re.search(r"^TORCH_CPU := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    assert set(re.findall(r"torch==\S+", DOCKERFILE.read_text())) == {torch[1]}


def test_rules_of_the_compose_file_are_current() -> None:
    assert PLAIN_RULES.read_text() == as_yaml(), "run python -m deploy.plain_rules"


def test_prometheus_of_the_compose_file_accepts_its_configuration(tmp_path: Path) -> None:
    text = (DEPLOY / "compose" / "prometheus.yaml").read_text()
    shutil.copy(PLAIN_RULES, tmp_path)
    configuration = tmp_path / "prometheus.yaml"
    configuration.write_text(text.replace("/etc/prometheus/rules.yaml", "rules.yaml"))
    subprocess.run(
        [program("promtool"), "check", "config", "--lint-fatal", configuration],
        check=True,
        capture_output=True,
    )


def test_the_compose_file_names_files_and_settings_that_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compose = yaml.safe_load(COMPOSE.read_text())
    for name, service in compose["services"].items():
        repository, _, tag = service["image"].rpartition(":")
        assert repository, name
        assert tag != "latest", name
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in compose["volumes"], source
        # Nothing is published beyond this machine.
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    fathom = compose["services"]["fathom"]
    assert fathom["build"]["target"] in re.findall(r" AS (\S+)", DOCKERFILE.read_text())
    for name, value in fathom["environment"].items():
        monkeypatch.setenv(name, value)
    settings = load_settings({})
    assert settings.allow_plaintext
    assert int(fathom["stop_grace_period"].removesuffix("s")) >= settings.grace_seconds + 10


def test_grafana_of_the_compose_file_finds_dashboard_and_source() -> None:
    provisioning = DEPLOY / "compose" / "grafana"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "fathom.yaml").read_text())[
        "providers"
    ]
    grafana = yaml.safe_load(COMPOSE.read_text())["services"]["grafana"]
    assert any(
        volume.split(":")[1].startswith(provider["options"]["path"])
        for volume in grafana["volumes"]
    )
    dashboard = json.loads((DEPLOY / "components" / "monitoring" / "dashboard.json").read_text())
    (variable,) = (each for each in dashboard["templating"]["list"] if each["type"] == "datasource")
    assert variable["query"] == source["type"]
