"""Shards: safetensors files, read as byte ranges and written from them.

The format: the number of header bytes as 8 bytes, little-endian; the header, JSON that maps
each tensor to its type, shape and range of bytes after the header; the tensors without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pruning.checkpoint import CheckpointError
from pruning.tensor_header import LENGTH_BYTES, read_header

_ALIGNMENT = 8
# Tensors are copied in chunks of this size.
_CHUNK_BYTES = 8 << 20


# Turns the bytes of a tensor into as many others.
Change = Callable[[bytearray], bytes]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a shard; its bytes are ``start`` to ``end`` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file; tensors are in the order of their bytes."""

    path: Path
    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Shard:
        """Read the header; raises :class:`CheckpointError` for a file that is not whole."""
        header = read_header(path)
        data_start = LENGTH_BYTES + len(header)
        document = json.loads(header)
        metadata = document.pop("__metadata__", {})
        tensors = [
            Tensor(
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                *(data_start + offset for offset in entry["data_offsets"]),
            )
            for name, entry in document.items()
        ]
        return cls(path, tuple(sorted(tensors, key=lambda t: (t.start, t.end))), metadata)

    def without(self, names: Collection[str]) -> Shard:
        """Return the shard without the tensors of these ``names``."""
        return replace(self, tensors=tuple(t for t in self.tensors if t.name not in names))

    def read_tensor(self, tensor: Tensor) -> bytearray:
        """Return the bytes of one of the tensors.

        Raises :class:`CheckpointError` if the file has become shorter meanwhile.
        """
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            data = bytearray(file.read(tensor.end - tensor.start))
        if len(data) != tensor.end - tensor.start:
            raise CheckpointError(f"{self.path}: truncated while it was read")
        return data


class NewShard:
    """A file to be written: tensors of one shard, some of them under new names or changed."""

    def __init__(
        self,
        source: Shard,
        tensors: Sequence[tuple[str, Tensor]],
        changes: Mapping[str, Change] | None = None,
    ) -> None:
        """``tensors`` are new names and tensors; ``changes`` go by the names in the source."""
        self.names = tuple(name for name, _ in tensors)
        self.num_tensor_bytes = sum(tensor.end - tensor.start for _, tensor in tensors)
        self._source = source
        self._tensors = [tensor for _, tensor in tensors]
        self._changes = {} if changes is None else changes
        self._head = _head(tensors, source.metadata)
        self.num_bytes = len(self._head) + self.num_tensor_bytes

    def write(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Write the file and wait until it is on the disk.

        ``on_bytes`` is called with the size of every chunk. Raises :class:`CheckpointError` if the
        source has become shorter meanwhile.
        """
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        with path.open("xb") as target, self._source.path.open("rb", buffering=0) as source:
            target.write(self._head)
            on_bytes(len(self._head))
            for start, end, change in self._ranges():
                source.seek(start)
                changed = bytearray()
                remaining = end - start
                while remaining:
                    count = source.readinto(buffer[:remaining])
                    if not count:
                        raise CheckpointError(f"{self._source.path}: truncated while it was read")
                    if change is None:
                        target.write(buffer[:count])
                    else:
                        changed += buffer[:count]
                    remaining -= count
                    on_bytes(count)
                if change is not None:
                    target.write(change(changed))
            target.flush()
            os.fsync(target.fileno())

    def _ranges(self) -> Iterator[tuple[int, int, Change | None]]:
        """Yield the bytes to copy, and what changes them.

        Tensors that follow one another are one range, unless they are changed.
        """
        start = end = 0
        for tensor in self._tensors:
            change = self._changes.get(tensor.name)
            if tensor.start != end or change is not None:
                if start < end:
                    yield start, end, None
                start = tensor.start
            end = tensor.end
            if change is not None:
                yield start, end, change
                start = end
        if start < end:
            yield start, end, None


def _head(tensors: Sequence[tuple[str, Tensor]], metadata: dict[str, str]) -> bytes:
    document: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, tensor in tensors:
        size = tensor.end - tensor.start
        document[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    header = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header
