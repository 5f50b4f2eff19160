"""Checks of resources against each other, and of values, that no schema can make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.deploy.pods import Pods, environment, pods_of, quantity, selects
from tests.deploy.rendering import Manifest

# Who applies the manifests makes these; the manifests that use them say so.
SECRETS = {"fathom-tls", "fathom-clients"}
PROBES = {
    "startupProbe": ("fathom.v1.Inference", "/readyz"),
    "readinessProbe": ("fathom.v1.Inference", "/readyz"),
    "livenessProbe": ("fathom.v1.Control", "/livez"),
}
# An engine that is busy makes a probe wait; shorter ones have emptied whole pools under load.
PROBE_SECONDS = 5
QUANTITY_KEYS = {"sizeLimit", "averageValue"}


def problems(manifests: list[Manifest]) -> list[str]:
    """Return the mistakes, each with its resource."""
    names = {(each["kind"], each["metadata"]["name"]) for each in manifests}
    all_pods = list(pods_of(manifests))
    return [
        *(problem for pods in all_pods for problem in _in_pods(pods, names)),
        *(problem for each in manifests for problem in _between(each, manifests, all_pods)),
        *(problem for each in manifests for problem in _quantities(each)),
        *_duplicates(manifests),
    ]


def _duplicates(manifests: list[Manifest]) -> Iterator[str]:
    seen = set()
    for each in manifests:
        key = (each["apiVersion"], each["kind"], each["metadata"]["name"])
        if key in seen:
            yield f"{each['kind']} {each['metadata']['name']}: is here twice"
        seen.add(key)


def _in_pods(pods: Pods, names: set[tuple[str, str]]) -> Iterator[str]:
    spec = pods.spec
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for volume in volumes.values():
        for kind, reference, key in (
            ("ConfigMap", "configMap", "name"),
            ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
            ("Secret", "secret", "secretName"),
        ):
            name = volume.get(reference, {}).get(key)
            if name is not None and (kind, name) not in names and name not in SECRETS:
                yield f"{pods.name}: {kind} {name} is not here"
    account = spec.get("serviceAccountName")
    if ("ServiceAccount", account) not in names:
        yield f"{pods.name}: ServiceAccount {account} is not here"
    needs_links_off = any("FATHOM_CONFIG" in environment(each) for each in spec["containers"])
    if needs_links_off and spec.get("enableServiceLinks") is not False:
        yield f"{pods.name}: enableServiceLinks is on, which sets FATHOM_PORT"
    for container in spec["containers"]:
        where = f"{pods.name}, {container['name']}"
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"{where}: volume {mount['name']} is not declared"
            if "subPath" in mount:
                yield f"{where}: what is mounted by subPath never changes"
        yield from _hardening(where, spec, container)
        yield from _image(where, container["image"])
        if pods.owner["kind"] != "Job":
            yield from _probes(where, pods, container)


def _hardening(where: str, spec: Any, container: Any) -> Iterator[str]:
    context = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
    if not (
        context.get("runAsNonRoot")
        and context.get("runAsUser", 0) > 0
        and context.get("readOnlyRootFilesystem")
        and context.get("allowPrivilegeEscalation") is False
        and "ALL" in context.get("capabilities", {}).get("drop", [])
        and context.get("seccompProfile", {}).get("type") == "RuntimeDefault"
    ):
        yield f"{where}: is not hardened"
    if "memory" not in container.get("resources", {}).get("limits", {}):
        yield f"{where}: has no limit of memory"


def _image(where: str, image: str) -> Iterator[str]:
    repository, _, tag = image.rpartition(":")
    if not repository or tag == "latest":
        yield f"{where}: image {image} has no tag that stays what it is"


def _probes(where: str, pods: Pods, container: Any) -> Iterator[str]:
    for kind, (service, path) in PROBES.items():
        probe = container.get(kind)
        if probe is None:
            yield f"{where}: no {kind}"
            continue
        if probe.get("timeoutSeconds", 1) < PROBE_SECONDS:
            yield f"{where}: {kind} waits for less than {PROBE_SECONDS} s"
        handler = probe.get("grpc") or probe.get("httpGet")
        if handler is None:
            continue
        if not pods.declares(handler["port"]):
            yield f"{where}: {kind} is on port {handler['port']}, which is not declared"
        if not pods.is_server:
            continue
        if "grpc" in probe:
            if handler.get("service") != service:
                yield f"{where}: {kind} asks for {handler.get('service')}, not for {service}"
            if "FATHOM_TLS_CERTIFICATE" in environment(container):
                yield f"{where}: {kind} is plain gRPC, and the server takes TLS"
        elif handler["path"] != path or handler["port"] != "metrics":
            yield f"{where}: {kind} is not {path} on the port of the metrics"


def _between(each: Manifest, manifests: list[Manifest], all_pods: list[Pods]) -> Iterator[str]:
    kind, name, spec = each["kind"], each["metadata"]["name"], each.get("spec", {})
    where = f"{kind} {name}"

    def selected(selector: dict[str, str]) -> list[Pods]:
        return [pods for pods in all_pods if selects(selector, pods)]

    match kind:
        case "Deployment":
            if not spec["selector"]["matchLabels"].items() <= (
                spec["template"]["metadata"]["labels"].items()
            ):
                yield f"{where}: its selector does not match its pods"
            rolling = spec.get("strategy", {}).get("rollingUpdate", {})
            if rolling.get("maxSurge") == rolling.get("maxUnavailable") == 0:
                yield f"{where}: no rollout gets anywhere"
            others = [
                pods for pods in selected(spec["selector"]["matchLabels"]) if pods.owner is not each
            ]
            if others:
                yield f"{where}: selects pods of {others[0].name}"
        case "Service":
            found = selected(spec["selector"])
            if not found:
                yield f"{where}: selects no pods"
            for pods in found:
                for port in spec["ports"]:
                    if not pods.declares(port.get("targetPort", port["port"])):
                        yield f"{where}: {port['name']} is no port of {pods.name}"
        case "NetworkPolicy":
            found = selected(spec["podSelector"]["matchLabels"])
            if not found:
                yield f"{where}: selects no pods"
            for rule in spec.get("ingress", []):
                for port in rule.get("ports", []):
                    if not all(pods.declares(port["port"]) for pods in found):
                        yield f"{where}: {port['port']} is no port of what it selects"
        case "PodDisruptionBudget":
            found = selected(spec["selector"]["matchLabels"])
            replicas = sum(pods.replicas for pods in found)
            if not found:
                yield f"{where}: selects no pods"
            elif _evictable(spec, replicas) < 1:
                yield f"{where}: blocks every drain of {replicas} replicas"
            elif replicas > 1 and _evictable(spec, replicas) >= replicas:
                yield f"{where}: protects none of {replicas} replicas"
        case "PodMonitor":
            found = selected(spec["selector"]["matchLabels"])
            if not found:
                yield f"{where}: selects no pods"
            for endpoint in spec["podMetricsEndpoints"]:
                if not all(endpoint["port"] in pods.ports for pods in found):
                    yield f"{where}: {endpoint['port']} is no named port of what it selects"
        case "InferencePool":
            found = selected(spec["selector"]["matchLabels"])
            if not found:
                yield f"{where}: selects no pods"
            for target in spec["targetPorts"]:
                if not all(pods.declares(target["number"]) for pods in found):
                    yield f"{where}: {target['number']} is no port of what it selects"
            picker = spec["endpointPickerRef"]
            yield from _backend(
                where, {"name": picker["name"], "port": picker["port"]["number"]}, manifests
            )
        case "HTTPRoute":
            for rule in spec["rules"]:
                if rule.get("timeouts", {}).get("request") != "0s":
                    yield f"{where}: ends streams that take long"
                for backend in rule["backendRefs"]:
                    yield from _backend(where, backend, manifests)
        case "HorizontalPodAutoscaler" | "ScaledObject":
            target = spec["scaleTargetRef"]["name"]
            targets = [
                other
                for other in manifests
                if other["kind"] == "Deployment" and other["metadata"]["name"] == target
            ]
            if not targets:
                yield f"{where}: Deployment {target} is not here"
            if any("replicas" in other["spec"] for other in targets):
                yield f"{where}: Deployment {target} sets replicas, too"


def _evictable(spec: Any, replicas: int) -> int:
    """Return how many of the replicas a budget lets go at a time."""

    def absolute(value: object) -> int:
        text = str(value)
        return -(-replicas * int(text[:-1]) // 100) if text.endswith("%") else int(text)

    if "maxUnavailable" in spec:
        return absolute(spec["maxUnavailable"])
    return replicas - absolute(spec["minAvailable"])


def _backend(where: str, backend: Any, manifests: list[Manifest]) -> Iterator[str]:
    kind = backend.get("kind", "Service")
    for other in manifests:
        if other["kind"] == kind and other["metadata"]["name"] == backend["name"]:
            if kind == "Service" and backend["port"] not in [
                port["port"] for port in other["spec"]["ports"]
            ]:
                yield f"{where}: {backend['port']} is no port of Service {backend['name']}"
            return
    yield f"{where}: {kind} {backend['name']} is not here"


def _quantities(each: Manifest) -> Iterator[str]:
    where = f"{each['kind']} {each['metadata']['name']}"

    def visit(value: Any) -> Iterator[str]:
        if isinstance(value, list):
            for item in value:
                yield from visit(item)
        if not isinstance(value, dict):
            return
        for key, item in value.items():
            if key in QUANTITY_KEYS:
                yield from _checked(where, key, item)
            elif key == "resources" and isinstance(item, dict):
                requests, limits = item.get("requests", {}), item.get("limits", {})
                for name, amount in [*requests.items(), *limits.items()]:
                    yield from _checked(where, name, amount)
                for name in requests.keys() & limits.keys():
                    try:
                        more = quantity(requests[name]) > quantity(limits[name])
                    except ValueError:
                        continue
                    if more:
                        yield f"{where}: requests more {name} than its limit"
            else:
                yield from visit(item)

    yield from visit(each.get("spec", {}))


def _checked(where: str, key: str, value: object) -> Iterator[str]:
    try:
        quantity(value)
    except ValueError as error:
        yield f"{where}: {key}: {error}"
