"""Pod templates of manifests, and the resources that select them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from tests.deploy.rendering import Manifest

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_UNITS = {"": Decimal(1), "m": Decimal("0.001")} | {
    f"{letter}{suffix}": Decimal(base) ** power
    for power, letter in enumerate("kMGTPE", start=1)
    for suffix, base in (("", 1000), ("i", 1024))
}
_UNITS["Ki"] = _UNITS.pop("ki")


@dataclass(frozen=True, slots=True)
class Pods:
    """The pod template of a resource."""

    owner: Manifest
    template: Any
    replicas: int

    @property
    def name(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata']['name']}"

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    @property
    def spec(self) -> Any:
        return self.template["spec"]

    @property
    def ports(self) -> dict[str, int]:
        """The ports of all containers by name."""
        return {
            port["name"]: port["containerPort"]
            for container in self.spec["containers"]
            for port in container.get("ports", [])
        }

    @property
    def is_server(self) -> bool:
        """Whether Fathom serves in these pods, for others than itself."""
        return self.labels.get("app.kubernetes.io/component") == "server"

    def declares(self, port: str | int) -> bool:
        return port in self.ports or port in self.ports.values()


def pods_of(manifests: list[Manifest]) -> Iterator[Pods]:
    for manifest in manifests:
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Deployment":
                yield Pods(manifest, spec["template"], spec.get("replicas", 2))
            case "Job":
                yield Pods(manifest, spec["template"], 1)
            case "LeaderWorkerSet":
                group = spec["leaderWorkerTemplate"]
                # The controller labels pods with their place in the group.
                leader = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
                template = group["leaderTemplate"]
                template["metadata"]["labels"] |= leader
                yield Pods(manifest, template, spec["replicas"])
                yield Pods(manifest, group["workerTemplate"], group["size"] - 1)


def quantity(value: object) -> Decimal:
    """Return the value of a quantity; raise ValueError if it is none."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is no quantity")
    number, unit = match.groups()
    return Decimal(number) * _UNITS[unit or ""]


def selects(selector: Mapping[str, str], pods: Pods) -> bool:
    return selector.items() <= pods.labels.items()


def environment(container: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that have plain values."""
    return {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}
