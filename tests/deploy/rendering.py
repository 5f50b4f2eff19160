"""Manifests as `kubectl kustomize` renders them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = tuple(sorted(path.name for path in (DEPLOY / "overlays").iterdir()))
COMPONENTS = tuple(sorted(path.name for path in (DEPLOY / "components").iterdir()))
KUBECTL = Path(sys.executable).with_name("kubectl")

Manifest = dict[str, Any]


@functools.cache
def _kustomize(directory: Path) -> str:
    result = subprocess.run(
        [KUBECTL, "kustomize", directory], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "kustomize warns"
    return result.stdout


def overlay(name: str) -> list[Manifest]:
    """Return the resources of an overlay."""
    return list(yaml.load_all(_kustomize(DEPLOY / "overlays" / name), yaml.CSafeLoader))


def base_with(directory: Path, *components: str) -> list[Manifest]:
    """Return the base with components, put together by a file that is written to ``directory``."""
    relative = Path(os.path.relpath(DEPLOY, directory))
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "fathom",
        "resources": [str(relative / "base")],
        "components": [str(relative / "components" / name) for name in components],
    }
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return list(yaml.load_all(_kustomize(directory), yaml.CSafeLoader))
