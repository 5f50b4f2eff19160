"""Errors of quantization."""

from __future__ import annotations


class QuantizationError(ValueError):
    """A checkpoint cannot be quantized like this."""


class QuantizationFailed(QuantizationError):
    """GPTQModel has failed, or its process was killed."""


class GroupSizeError(QuantizationError):
    """The group size does not fit the model."""

    def __init__(self, group_size: int, allowed: str) -> None:
        self.group_size = group_size
        self.allowed = allowed
        super().__init__(f"group_size: got {group_size}, allowed: {allowed}")
