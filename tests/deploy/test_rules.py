"""Alerts and recording rules, checked and unit-tested by promtool."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from tests.deploy.rendering import ROOT
from tests.deploy.rules import alerts, rule_groups

TESTS = Path(__file__).with_name("alerts.yaml")
# Whom Alertmanager tells, by severity: what a user of these alerts would write.
ROUTES = {
    "route": {
        "receiver": "tickets",
        "group_by": ["alertname", "namespace"],
        "routes": [{"receiver": "pager", "matchers": ['severity="critical"']}],
    },
    "receivers": [{"name": "tickets"}, {"name": "pager"}],
}


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is absent; .ci/install installs it where it can")
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Has the rules as Prometheus reads them, and their tests."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule_groups()))
    shutil.copy(TESTS, tmp_path)
    return tmp_path


def run(directory: Path, *command: str) -> str:
    result = subprocess.run(
        command,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_rules_are_valid(directory: Path) -> None:
    run(directory, program("promtool"), "check", "rules", "--lint-fatal", "rules.yaml")


def test_alerts_fire_when_they_should(directory: Path) -> None:
    run(directory, program("promtool"), "test", "rules", TESTS.name)


def test_every_alert_is_tested_both_ways() -> None:
    expected = defaultdict(set)
    for test in yaml.safe_load(TESTS.read_text())["tests"]:
        for each in test["alert_rule_test"]:
            expected[each["alertname"]].add(bool(each["exp_alerts"]))
    assert expected == {alert["alert"]: {True, False} for alert in alerts()}


def test_every_alert_has_a_runbook() -> None:
    text = (ROOT / "deploy" / "README.md").read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    for alert in alerts():
        document, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert document == "deploy/README.md"
        assert anchor == alert["alert"].lower()
        assert alert["alert"] in headings


def test_alerts_reach_whom_they_concern(directory: Path) -> None:
    amtool = program("amtool")
    (directory / "alertmanager.yaml").write_text(yaml.safe_dump(ROUTES))
    run(directory, amtool, "check-config", "alertmanager.yaml")
    for alert in alerts():
        labels = [f"{name}={value}" for name, value in alert["labels"].items()]
        receiver = run(
            directory,
            amtool,
            *("config", "routes", "test", "--config.file=alertmanager.yaml"),
            f"alertname={alert['alert']}",
            *labels,
        )
        assert (
            receiver.splitlines()[-1]
            == {"critical": "pager", "warning": "tickets"}[alert["labels"]["severity"]]
        )
