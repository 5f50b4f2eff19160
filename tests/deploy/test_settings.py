"""Arguments, variables and settings files of the manifests, as the server itself reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from server.access.exposure import check_exposure
from server.cli import app
from server.config import ENV_PREFIX, ConfigError, Settings, load_settings
from server.engine.arguments import RESERVED, check_engine_args
from tests.deploy.pods import Pods, environment, pods_of
from tests.deploy.rendering import Manifest, overlay

# What the engine's end takes beyond the grace period of requests.
END_SECONDS = 10


def serving_containers(manifests: list[Manifest]) -> Iterator[tuple[Pods, Any]]:
    for pods in pods_of(manifests):
        for container in pods.spec["containers"]:
            if "FATHOM_CONFIG" in environment(container):
                yield pods, container


def mounted(pods: Pods, container: Any, manifests: list[Manifest], root: Path) -> None:
    """Write the files that ConfigMaps and Secrets bring into the container to ``root``."""
    volumes = {volume["name"]: volume for volume in pods.spec["volumes"]}
    for mount in container["volumeMounts"]:
        directory = root / mount["mountPath"].lstrip("/")
        directory.mkdir(parents=True)
        volume = volumes[mount["name"]]
        if "configMap" in volume:
            (data,) = (
                each["data"]
                for each in manifests
                if each["kind"] == "ConfigMap"
                and each["metadata"]["name"] == volume["configMap"]["name"]
            )
            for name, text in data.items():
                (directory / name).write_text(text)
        elif volume.get("secret", {}).get("secretName") == "fathom-tls":
            (directory / "tls.crt").touch()
            (directory / "tls.key").touch()
        elif volume.get("secret", {}).get("secretName") == "fathom-clients":
            (directory / "clients").touch()


def serve_flags(container: Any) -> dict[str, Any]:
    """Return the flags of ``fathom serve`` in the container's arguments, as the command reads
    them.
    """
    arguments = container["args"]
    if container.get("command", ["fathom"])[0] == "sh":
        (line,) = (
            line
            for argument in arguments
            for line in argument.splitlines()
            if "fathom serve" in line
        )
        arguments = line.partition("fathom ")[2].rstrip(" &").split()
    assert arguments[0] == "serve"
    command = typer.main.get_group(app).commands["serve"]
    with command.make_context("serve", list(arguments[1:])) as context:
        return dict(context.params)


def settings_of(
    pods: Pods,
    container: Any,
    manifests: list[Manifest],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    """Return the settings that the server in this container has, its files below ``root``."""
    mounted(pods, container, manifests, root)
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    for name, value in environment(container).items():
        if name.startswith(ENV_PREFIX):
            is_mounted = any(Path(value).is_relative_to(path) for path in paths)
            monkeypatch.setenv(name, str(root / value.lstrip("/")) if is_mounted else value)
    return load_settings(serve_flags(container))


@pytest.fixture
def all_settings(
    manifests: list[Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Pods, Any, Settings]]:
    """The settings of every server among the manifests."""
    found = []
    for number, (pods, container) in enumerate(serving_containers(manifests)):
        with monkeypatch.context() as context:
            settings = settings_of(pods, container, manifests, tmp_path / str(number), context)
        found.append((pods, container, settings))
    assert found
    return found


def test_the_server_accepts_them(all_settings: list[tuple[Pods, Any, Settings]]) -> None:
    for _, container, settings in all_settings:
        check_exposure(settings)
        check_engine_args(settings.engine_args, RESERVED)
        image = container["image"]
        on_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert on_gpu or "gpu_memory_utilization" not in settings.engine_args, image


def test_ports_are_those_of_the_settings(all_settings: list[tuple[Pods, Any, Settings]]) -> None:
    for pods, container, settings in all_settings:
        if pods.is_server:
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert (ports["grpc"], ports["metrics"]) == (settings.port, settings.metrics_port)
            assert (settings.host, settings.metrics_host) == ("0.0.0.0", "0.0.0.0")


def test_a_stop_has_the_time_that_it_takes(
    all_settings: list[tuple[Pods, Any, Settings]],
) -> None:
    for pods, container, settings in all_settings:
        if not pods.is_server:
            continue
        assert "lifecycle" not in container, "the server itself goes on serving for a while"
        readiness = container["readinessProbe"]
        noticed = readiness["periodSeconds"] * readiness["failureThreshold"]
        serving_on = settings.drain_delay_seconds
        # Balancers go on sending for as long as they take to notice.
        assert serving_on >= noticed, pods.name
        stop_seconds = serving_on + settings.grace_seconds + END_SECONDS
        assert pods.spec["terminationGracePeriodSeconds"] >= stop_seconds, pods.name


def test_a_tensor_parallel_engine_has_its_gpus(
    all_settings: list[tuple[Pods, Any, Settings]],
) -> None:
    for pods, container, settings in all_settings:
        gpus = int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
        if pods.owner["kind"] == "LeaderWorkerSet":
            gpus *= pods.owner["spec"]["leaderWorkerTemplate"]["size"]
        assert settings.tensor_parallel_size == max(gpus, 1), pods.name


def test_a_setting_that_is_misspelt_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = overlay("gpu")
    (settings,) = (
        each
        for each in manifests
        if each["kind"] == "ConfigMap" and each["metadata"]["name"] == "fathom"
    )
    settings["data"]["fathom.yaml"] += "grace_second: 5\n"
    ((pods, container),) = serving_containers(manifests)
    with pytest.raises(ConfigError, match="did you mean grace_seconds"):
        settings_of(pods, container, manifests, tmp_path, monkeypatch)
