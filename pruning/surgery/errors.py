"""Errors of surgery."""

from __future__ import annotations


class SurgeryError(ValueError):
    """A checkpoint cannot be cut, or cannot be written to the given place."""
