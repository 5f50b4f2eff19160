"""Merging of layers into the tensors of a checkpoint, as they are copied."""

from __future__ import annotations

from collections.abc import Sequence

from pruning.collapse import Collapse
from pruning.surgery.errors import SurgeryError
from pruning.surgery.shard import Change, Shard, Tensor
from pruning.surgery.tensor_dtype import COMPUTABLE, changed_bytes, torch_dtype


def merging_changes(
    shards: Sequence[Shard], container: str, collapse: Collapse
) -> dict[str, Change]:
    """Return the changes of a checkpoint's tensors, by name.

    ``container`` is the name of the list of layers. Each tensor of a layer that has taken up others
    becomes the sum of theirs, times their factors, in float64. Raises :class:`SurgeryError` for
    layers of different tensors, and for tensors that are not of floating-point numbers.
    """
    found = {tensor.name: (shard, tensor) for shard in shards for tensor in shard.tensors}
    changes: dict[str, Change] = {}
    for layer, factors in collapse.layers.items():
        if len(factors) == 1:
            continue
        prefix = f"{container}.{layer}."
        for name, (_, tensor) in found.items():
            if not name.startswith(prefix):
                continue
            parts = []
            for source, factor in factors.items():
                other_name = f"{container}.{source}.{name.removeprefix(prefix)}"
                shard, other = found.get(other_name, (None, None))
                if shard is None or other is None:
                    raise SurgeryError(
                        f"layers cannot be merged: the checkpoint has no {other_name}"
                    )
                if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                    raise SurgeryError(
                        f"layers cannot be merged: {other_name} is {other.dtype} of the shape "
                        f"{list(other.shape)}, allowed: {tensor.dtype} of the shape "
                        f"{list(tensor.shape)}, as {name}"
                    )
                parts.append((factor, shard, other))
            changes[name] = _change(tensor, parts)
    return changes


def _change(tensor: Tensor, parts: Sequence[tuple[float, Shard, Tensor]]) -> Change:
    dtype = torch_dtype(tensor)
    if dtype is None:
        raise SurgeryError(
            f"layers cannot be merged: {tensor.name} is of type {tensor.dtype}, allowed: "
            f"{', '.join(COMPUTABLE)}"
        )

    def change(data: bytearray) -> bytes:
        import torch

        total = torch.zeros(tensor.shape, dtype=torch.float64)
        for factor, shard, part in parts:
            read = torch.frombuffer(shard.read_tensor(part), dtype=dtype).view(tensor.shape)
            total += factor * read.double()
        result = total.to(dtype)
        if not bool(result.isfinite().all()):
            raise SurgeryError(f"{tensor.name}: the merged weights do not fit into {dtype}")
        return changed_bytes(result)

    return change
