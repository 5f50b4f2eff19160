"""Manifests against the schemas of Kubernetes and of custom resources, unknown fields refused."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.conftest import data_path
from tests.deploy.rendering import Manifest, base_with, overlay

KUBERNETES = "1.37"
# Custom resources with a definition to validate against, by kind.
DEFINITIONS = {
    "HTTPRoute": "httproutes.yaml",
    "InferencePool": "inferencepools.yaml",
    "LeaderWorkerSet": "leaderworkersets.yaml",
}
# Groups of custom resources that a package of npm has validators for.
VALIDATORS = {"keda.sh", "monitoring.coreos.com"}
CUSTOM_RESOURCES = Path(__file__).with_name("custom_resources")


def group(manifest: Manifest) -> str:
    name, slash, _ = manifest["apiVersion"].partition("/")
    return name if slash else ""


def strict(schema: Any) -> Any:
    """Return a schema of a definition that refuses fields that it does not name."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    closed = "properties" in schema and "additionalProperties" not in schema
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result["additionalProperties"] = False
    return result


@functools.cache
def read_definition(path: Path) -> Any:
    return yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]


def definition_problems(manifest: Manifest) -> list[str]:
    """Return the errors of a custom resource by its definition."""
    definition = read_definition(data_path(f"crds/{DEFINITIONS[manifest['kind']]}"))
    version = manifest["apiVersion"].rpartition("/")[2]
    assert definition["group"] == group(manifest), manifest["apiVersion"]
    (schema,) = [
        each["schema"]["openAPIV3Schema"]
        for each in definition["versions"]
        if each["name"] == version
    ]
    validator = jsonschema.Draft202012Validator(strict(schema))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def validator_problems(manifests: list[Manifest]) -> str:
    """Return the errors that npm's validators find in custom resources, or skip the test."""
    node = shutil.which("node")
    if node is None or not (CUSTOM_RESOURCES / "node_modules").is_dir():
        pytest.skip("npm's packages are absent; make test-deploy installs them where npm is")
    result = subprocess.run(
        [node, CUSTOM_RESOURCES / "validate.mjs"],
        input=json.dumps(manifests),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def is_custom(manifest: Manifest) -> bool:
    return manifest["kind"] in DEFINITIONS or group(manifest) in VALIDATORS


def test_resources_of_kubernetes(manifests: list[Manifest]) -> None:
    """A kind that is unknown raises, too."""
    checked = [manifest for manifest in manifests if not is_custom(manifest)]
    assert checked
    for manifest in checked:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_resources_with_a_definition(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] in DEFINITIONS:
            assert definition_problems(manifest) == [], manifest["metadata"]["name"]


def test_resources_of_operators(manifests: list[Manifest]) -> None:
    found = [manifest for manifest in manifests if group(manifest) in VALIDATORS]
    if found:
        assert validator_problems(found) == ""


class TestMistakesAreFound:
    def test_in_resources_of_kubernetes(self) -> None:
        (deployment,) = (each for each in overlay("gpu") if each["kind"] == "Deployment")
        deployment["spec"]["replcas"] = 2
        with pytest.raises(kubernetes_validate.ValidationError, match="replcas"):
            kubernetes_validate.validate(deployment, KUBERNETES, strict=True)
        with pytest.raises(kubernetes_validate.SchemaNotFoundError):
            kubernetes_validate.validate({**deployment, "kind": "Deploy"}, KUBERNETES, strict=True)

    def test_in_resources_with_a_definition(self) -> None:
        (workers,) = (each for each in overlay("multi-node") if each["kind"] == "LeaderWorkerSet")
        template = workers["spec"]["leaderWorkerTemplate"]
        template["size"] = "two"
        template["leaderTemplate"]["spec"]["containers"][0]["imag"] = "fathom"
        problems = "\n".join(definition_problems(workers))
        assert "size: 'two' is not of type 'integer'" in problems
        assert "'imag' was unexpected" in problems

    def test_in_resources_of_operators(self, tmp_path: Path) -> None:
        manifests = base_with(tmp_path, "autoscaling-keda", "monitoring")
        (scaled,) = (each for each in manifests if each["kind"] == "ScaledObject")
        (monitor,) = (each for each in manifests if each["kind"] == "PodMonitor")
        scaled["spec"]["minReplicas"] = 2
        monitor["spec"]["podMetricsEndpoints"][0]["port"] = 9090
        problems = validator_problems([scaled, monitor])
        assert "minReplicas" in problems
        assert "data/spec/podMetricsEndpoints/0/port must be string" in problems
        unknown = {**monitor, "kind": "PodMonitr"}
        assert "has no such kind" in validator_problems([unknown])
