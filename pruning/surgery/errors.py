"""What surgery refuses."""

from __future__ import annotations


class SurgeryError(ValueError):
    """A checkpoint cannot be cut, or not be written where it was asked for."""
