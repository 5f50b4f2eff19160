"""Folding of repair into the tensors of a checkpoint, as they are copied."""

from __future__ import annotations

from collections.abc import Collection

from pruning.repair.errors import RepairError
from pruning.repair.folding import DOWN_PROJECTION, Fold, FoldedRepair
from pruning.surgery.shard import Change, Tensor
from pruning.surgery.tensor_dtype import COMPUTABLE, changed_bytes, torch_dtype


def folding_changes(
    tensors: Collection[Tensor], container: str, repair: FoldedRepair
) -> dict[str, Change]:
    """Return the changes of a checkpoint's tensors, by name.

    ``container`` is the name of the list of layers. Raises :class:`RepairError` for a checkpoint
    without the down projections, and for one that is not of floating-point numbers.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    changes: dict[str, Change] = {}
    for fold in repair.folds:
        prefix = f"{container}.{fold.layer}.{DOWN_PROJECTION}"
        for name in (f"{prefix}.weight", f"{prefix}.bias"):
            tensor = by_name.get(name)
            if tensor is not None:
                changes[name] = _change(tensor, fold)
            elif name.endswith("weight"):
                raise RepairError(f"repair: cannot be folded: the checkpoint has no {name}")
    return changes


def _change(tensor: Tensor, fold: Fold) -> Change:
    dtype = torch_dtype(tensor)
    if dtype is None:
        raise RepairError(
            f"repair: cannot be folded: {tensor.name} is of type {tensor.dtype}, allowed: "
            f"{', '.join(COMPUTABLE)}"
        )
    if not tensor.shape or tensor.shape[0] != len(fold.weight):
        raise RepairError(
            f"repair: cannot be folded: {tensor.name} has the shape {list(tensor.shape)}, "
            f"allowed: [{len(fold.weight)}, ...]"
        )

    def change(data: bytearray) -> bytes:
        import torch

        weight = torch.frombuffer(data, dtype=dtype).view(tensor.shape)
        return changed_bytes(fold.projection(weight))

    return change
