"""The rules for Prometheus that the manifests carry."""

from __future__ import annotations

from typing import Any

import yaml

from tests.deploy.rendering import DEPLOY

RULES = DEPLOY / "components" / "monitoring" / "rules.yaml"


def rule_groups() -> Any:
    """Return what Prometheus itself reads: the specification of the PrometheusRule."""
    return yaml.safe_load(RULES.read_text())["spec"]


def rules() -> list[dict[str, Any]]:
    return [rule for group in rule_groups()["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]
