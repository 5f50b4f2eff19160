"""Types of a checkpoint's tensors that can be computed with, and the bytes of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruning.surgery.shard import Tensor

if TYPE_CHECKING:
    import torch

COMPUTABLE = ("F32", "F16", "BF16")


def torch_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the type of a tensor; None for one that is not of floating-point numbers."""
    import torch

    types = dict(zip(COMPUTABLE, (torch.float32, torch.float16, torch.bfloat16), strict=True))
    return types.get(tensor.dtype)


def changed_bytes(result: torch.Tensor) -> bytes:
    """Return the bytes of a tensor as a checkpoint has them."""
    import torch

    return result.contiguous().flatten().view(torch.uint8).numpy().tobytes()
