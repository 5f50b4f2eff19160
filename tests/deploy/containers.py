"""Pods of rendered manifests as real containers of podman's.

Podman plays neither probes nor the hooks of a pod; the tests do that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.pods import Pods, environment, quantity
from tests.deploy.rendering import DEPLOY, ROOT, Manifest

BASE_IMAGE = "localhost/fathom-test-base"
RUNTIME_IMAGE = "localhost/fathom-test-runtime"
# No base image can be pulled everywhere: one is made of Debian's packages.
BASE_PACKAGES = "python3,ca-certificates"
# Limits, runtime and groups that also hold where there is no systemd.
CONFIGURATION = """
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class Podman:
    """The command, with a configuration of its own."""

    def __init__(self, directory: Path) -> None:
        """Skip the test where containers cannot be run."""
        if shutil.which("podman") is None or shutil.which("runc") is None:
            pytest.skip("podman or runc is absent; .ci/install installs them where it can")
        if os.geteuid() != 0:
            pytest.skip("containers with limits take root here")
        configuration = directory / "containers.conf"
        configuration.write_text(CONFIGURATION)
        self._environment = {**os.environ, "CONTAINERS_CONF": str(configuration)}

    def run(self, *arguments: str | Path, check: bool = True) -> str:
        """Return what the command prints; raise AssertionError, with all of it, where it fails."""
        result = subprocess.run(
            ["podman", *arguments],
            capture_output=True,
            text=True,
            env=self._environment,
            check=False,
        )
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def has_image(self, name: str) -> bool:
        return bool(self.run("images", "--quiet", name).strip())

    def build_runtime(self, directory: Path) -> str:
        """Build the Dockerfile's stage ``runtime``: the image without its environment."""
        if not self.has_image(BASE_IMAGE):
            if shutil.which("mmdebstrap") is None:
                pytest.skip("mmdebstrap is absent; .ci/install installs it where it can")
            archive = directory / "base.tar"
            subprocess.run(
                [
                    "mmdebstrap",
                    "--variant=minbase",
                    "--dpkgopt=force-unsafe-io",
                    f"--include={BASE_PACKAGES}",
                    *("--quiet", "bookworm", str(archive)),
                ],
                check=True,
                capture_output=True,
            )
            self.run("import", archive, BASE_IMAGE)
        self.run(
            *("build", "--quiet", "--format=docker", "--isolation=oci"),
            *("--ulimit=nofile=16384:16384", "--ulimit=nproc=16384:16384"),
            f"--build-arg=BASE_IMAGE={BASE_IMAGE}",
            *("--target=runtime", f"--tag={RUNTIME_IMAGE}"),
            f"--file={DEPLOY / 'Dockerfile'}",
            ROOT,
        )
        return RUNTIME_IMAGE


class Container:
    """A container of a pod, which listens on loopback of this machine."""

    def __init__(self, podman: Podman, name: str) -> None:
        self._podman = podman
        self.name = name

    @property
    def state(self) -> dict[str, Any]:
        (inspected,) = json.loads(self._podman.run("inspect", self.name))
        state: dict[str, Any] = inspected["State"]
        return state

    @property
    def is_running(self) -> bool:
        return bool(self.state["Running"])

    @property
    def log(self) -> str:
        result = subprocess.run(
            ["podman", "logs", self.name], capture_output=True, text=True, check=False
        )
        return result.stdout + result.stderr

    def port(self, inside: int) -> int:
        """Return the port of this machine that leads to one of the container's."""
        address = self._podman.run("port", self.name, str(inside)).strip()
        return int(address.rpartition(":")[2])

    def execute(self, *command: str) -> str:
        return self._podman.run("exec", self.name, *command)

    def signal(self, name: str) -> None:
        self._podman.run("kill", f"--signal={name}", self.name)

    def wait(self) -> int:
        """Return the exit code, once it has ended."""
        return int(self._podman.run("wait", self.name))


@contextmanager
def running_container(
    podman: Podman, image: str, pods: Pods, manifests: list[Manifest], directory: Path
) -> Iterator[Container]:
    """Run the pod's container as the manifest says, with this tree and its environment in it."""
    (container,) = pods.spec["containers"]
    security = {**pods.spec["securityContext"], **container["securityContext"]}
    arguments: list[str] = [
        f"--user={security['runAsUser']}:{security['runAsGroup']}",
        f"--memory={int(quantity(container['resources']['limits']['memory']))}",
        "--pids-limit=4096",
    ]
    assert security["readOnlyRootFilesystem"]
    arguments += ["--read-only", "--read-only-tmpfs=false"]
    assert security["allowPrivilegeEscalation"] is False
    arguments += ["--security-opt=no-new-privileges"]
    arguments += [f"--cap-drop={each}" for each in security["capabilities"]["drop"]]
    for name, value in environment(container).items():
        arguments.append(f"--env={name}={value}")
    for port in container["ports"]:
        arguments.append(f"--publish=127.0.0.1::{port['containerPort']}")
    volumes = {volume["name"]: volume for volume in pods.spec["volumes"]}
    group = security["fsGroup"]
    for mount in container["volumeMounts"]:
        arguments += _mounted(mount, volumes[mount["name"]], manifests, directory, group)
    name = f"fathom-test-{os.getpid()}"
    podman.run(
        *(
            "run",
            "--detach",
            f"--name={name}",
            *arguments,
            *_with_this_environment(directory),
            image,
        ),
        *container["args"],
    )
    try:
        yield Container(podman, name)
    finally:
        podman.run("rm", "--force", "--time=0", name, check=False)


def _mounted(
    mount: Any, volume: Any, manifests: list[Manifest], directory: Path, group: int
) -> Iterator[str]:
    target = mount["mountPath"]
    if "configMap" in volume:
        (data,) = (
            each["data"]
            for each in manifests
            if each["kind"] == "ConfigMap"
            and each["metadata"]["name"] == volume["configMap"]["name"]
        )
        source = directory / volume["name"]
        source.mkdir()
        for name, text in data.items():
            (source / name).write_text(text)
        yield f"--volume={source}:{target}:ro"
    elif target == "/dev/shm":
        yield f"--shm-size={int(quantity(volume['emptyDir']['sizeLimit']))}"
    else:
        source = directory / volume["name"]
        source.mkdir()
        # As kubelet makes an emptyDir for the pod's group.
        os.chown(source, 0, group)
        source.chmod(0o2777)
        yield f"--volume={source}:{target}"


def _with_this_environment(directory: Path) -> Iterator[str]:
    """Mount the environment that runs the tests where the image has its own."""
    prefix, base = Path(sys.prefix), Path(sys.base_prefix)
    for path in {prefix, base, ROOT}:
        if path != Path("/usr"):
            yield f"--volume={path}:{path}:ro"
    if base.is_relative_to("/root"):
        # In the image, none but root may pass through it.
        passage = directory / "root"
        passage.mkdir(mode=0o755)
        yield f"--volume={passage}:/root"
    yield f"--env=PATH={sysconfig.get_path('scripts')}:/usr/bin:/bin"
    yield f"--env=PYTHONPATH={ROOT}"
    # More threads would fight over the machine with the tests beside this one.
    yield "--env=OMP_NUM_THREADS=1"
