"""What a report says where it cannot measure."""

from __future__ import annotations


class NotPossible(Exception):
    """What a section measures cannot be had for this model, on this machine or as it was asked."""
