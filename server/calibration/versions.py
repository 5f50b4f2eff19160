"""The versions of packages that measurements depend on."""

from __future__ import annotations

from importlib import metadata

from server.engine.elastic.compatibility import vllm_version


def measuring_versions() -> dict[str, str]:
    """Return package name to version, for the provenance of a plan."""
    versions = {name: metadata.version(name) for name in ("fathom-server", "torch", "transformers")}
    return {**versions, "vllm": vllm_version()}
