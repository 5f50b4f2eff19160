"""Prometheus' rules in the form for servers without the Prometheus operator.

    python -m deploy.plain_rules

writes the specification of the PrometheusRule to compose/rules.yaml. That file is checked in, and
a test fails when it is not current.
"""

from __future__ import annotations

from pathlib import Path

import yaml

_SOURCE = Path(__file__).parent / "components" / "monitoring" / "rules.yaml"
PATH = Path(__file__).parent / "compose" / "rules.yaml"
_HEAD = "# Written by `python -m deploy.plain_rules`.\n"


def as_yaml() -> str:
    """Return the content of the file."""
    rules = yaml.safe_load(_SOURCE.read_text("utf-8"))["spec"]
    return _HEAD + yaml.safe_dump(rules, sort_keys=False, width=1000)


if __name__ == "__main__":
    PATH.write_text(as_yaml(), "utf-8")
