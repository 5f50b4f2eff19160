"""Every set of manifests that somebody may apply."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.rendering import COMPONENTS, OVERLAYS, Manifest, base_with, overlay

# What a component takes besides the base.
NEEDS = {"autoscaling-hpa": ("monitoring",), "autoscaling-keda": ("monitoring",)}


@pytest.fixture(params=[*OVERLAYS, *(f"base+{name}" for name in COMPONENTS)])
def manifests(request: pytest.FixtureRequest, tmp_path: Path) -> list[Manifest]:
    """The resources of an overlay, or of the base with one component."""
    name: str = request.param
    if name in OVERLAYS:
        return overlay(name)
    component = name.removeprefix("base+")
    return base_with(tmp_path, *NEEDS.get(component, ()), component)
