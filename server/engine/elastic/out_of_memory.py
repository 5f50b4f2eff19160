"""Recognition of errors that say that memory has run out."""

from __future__ import annotations

import errno

import torch

# torch's messages on CPU, where the error has no class of its own.
_ON_CPU = "can't allocate memory", "not enough memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error``, or what caused it, says that memory has run out."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in _ON_CPU):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
