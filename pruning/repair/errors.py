"""What is wrong with repair maps, or with what they are to be fitted on."""

from __future__ import annotations


class RepairError(ValueError):
    """Maps are damaged, of another model, or cannot be fitted."""
