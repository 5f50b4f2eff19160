"""The version of this package."""

from __future__ import annotations

from importlib import metadata

VERSION = metadata.version("fathom-server")
