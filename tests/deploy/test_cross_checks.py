"""Resources agree with each other, and the check finds common mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.cross_checks import problems
from tests.deploy.rendering import Manifest, base_with, overlay


def test_no_mistakes_between_resources(manifests: list[Manifest]) -> None:
    assert problems(manifests) == []


def find(manifests: list[Manifest], kind: str) -> Any:
    (found,) = (each for each in manifests if each["kind"] == kind)
    return found


def container(manifests: list[Manifest]) -> Any:
    return find(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]


def set_in(*path: str | int) -> Callable[[Any, object], None]:
    """Return a function that sets the value at the path."""

    def change(value: Any, new: object) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = new

    return change


@pytest.mark.parametrize(
    ("kind", "path", "value", "problem"),
    [
        ("Service", ("spec", "selector"), {"app": "other"}, "Service fathom: selects no pods"),
        (
            "Service",
            ("spec", "ports", 0, "targetPort"),
            "http",
            "Service fathom: grpc is no port of Deployment fathom",
        ),
        (
            "PodDisruptionBudget",
            ("spec",),
            {
                "minAvailable": 2,
                "selector": {"matchLabels": {"app.kubernetes.io/component": "server"}},
            },
            "PodDisruptionBudget fathom: blocks every drain of 2 replicas",
        ),
        (
            "PodDisruptionBudget",
            ("spec", "maxUnavailable"),
            "100%",
            "PodDisruptionBudget fathom: protects none of 2 replicas",
        ),
        (
            "PodMonitor",
            ("spec", "podMetricsEndpoints", 0, "port"),
            "http",
            "PodMonitor fathom: http is no named port of what it selects",
        ),
        (
            "NetworkPolicy",
            ("spec", "ingress", 0, "ports", 0, "port"),
            8000,
            "NetworkPolicy fathom: 8000 is no port of what it selects",
        ),
        (
            "Deployment",
            ("spec", "strategy", "rollingUpdate"),
            {"maxSurge": 0, "maxUnavailable": 0},
            "Deployment fathom: no rollout gets anywhere",
        ),
        (
            "Deployment",
            ("spec", "selector", "matchLabels", "app"),
            "other",
            "Deployment fathom: its selector does not match its pods",
        ),
    ],
)
def test_mistakes_in_a_resource(
    kind: str, path: tuple[str | int, ...], value: object, problem: str
) -> None:
    manifests = overlay("gpu")
    set_in(*path)(find(manifests, kind), value)
    assert problem in problems(manifests)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("resources", "limits", "memory"), "16GiB", "memory: '16GiB' is no quantity"),
        (("resources", "limits", "memory"), "8Gi", "requests more memory than its limit"),
        (("image",), "registry.example/fathom:latest", "has no tag that stays what it is"),
        (("image",), "fathom", "has no tag that stays what it is"),
        (("securityContext", "readOnlyRootFilesystem"), False, "is not hardened"),
        (("startupProbe",), None, "no startupProbe"),
        (("readinessProbe", "timeoutSeconds"), 1, "readinessProbe waits for less than 5 s"),
        (("volumeMounts", 0, "name"), "configuration", "volume configuration is not declared"),
        (("volumeMounts", 0, "subPath"), "fathom.yaml", "mounted by subPath never changes"),
    ],
)
def test_mistakes_in_a_container(path: tuple[str | int, ...], value: object, problem: str) -> None:
    manifests = overlay("gpu")
    set_in(*path)(container(manifests), value)
    assert any(problem in found for found in problems(manifests)), problems(manifests)


@pytest.mark.parametrize(
    ("probe", "handler", "problem"),
    [
        ("livenessProbe", {"grpc": {"port": 50051, "service": ""}}, "asks for , not for"),
        (
            "livenessProbe",
            {"grpc": {"port": 50051, "service": "fathom.v1.Inference"}},
            "asks for fathom.v1.Inference, not for fathom.v1.Control",
        ),
        (
            "readinessProbe",
            {"grpc": {"port": 50052, "service": "fathom.v1.Inference"}},
            "port 50052, which is not declared",
        ),
        (
            "readinessProbe",
            {"httpGet": {"port": "metrics", "path": "/livez"}},
            "is not /readyz on the port of the metrics",
        ),
    ],
)
def test_mistakes_in_a_probe(probe: str, handler: dict[str, object], problem: str) -> None:
    manifests = overlay("cpu-demo")
    container(manifests)[probe] = {"timeoutSeconds": 5, **handler}
    assert any(problem in found for found in problems(manifests)), problems(manifests)


def test_plain_probes_of_a_server_with_tls() -> None:
    manifests = overlay("cpu-demo")
    container(manifests)["env"].append({"name": "FATHOM_TLS_CERTIFICATE", "value": "/tls.crt"})
    assert (
        "Deployment fathom, fathom: livenessProbe is plain gRPC, and the server takes TLS"
        in problems(manifests)
    )


def test_a_reference_to_what_is_not_here() -> None:
    manifests = overlay("gpu")
    without = [each for each in manifests if each["kind"] != "PersistentVolumeClaim"]
    assert "Deployment fathom: PersistentVolumeClaim fathom-state is not here" in problems(without)


def test_an_autoscaler_and_a_deployment_that_both_set_replicas(tmp_path: Path) -> None:
    manifests = base_with(tmp_path, "monitoring", "autoscaling-hpa")
    find(manifests, "Deployment")["spec"]["replicas"] = 3
    assert "HorizontalPodAutoscaler fathom: Deployment fathom sets replicas, too" in problems(
        manifests
    )


def test_a_route_that_ends_streams_or_leads_nowhere(tmp_path: Path) -> None:
    manifests = base_with(tmp_path, "gateway")
    rule = find(manifests, "HTTPRoute")["spec"]["rules"][0]
    del rule["timeouts"]
    rule["backendRefs"][0]["name"] = "pool"
    found = problems(manifests)
    assert "HTTPRoute fathom: ends streams that take long" in found
    assert "HTTPRoute fathom: InferencePool pool is not here" in found
