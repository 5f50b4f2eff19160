"""Work on long lists that lets other calls have their turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

T = TypeVar("T")

_PIECE = 1024


async def in_pieces(values: Sequence[T]) -> AsyncIterator[Sequence[T]]:
    """Yield the values in pieces, and let the event loop do other things between them."""
    for start in range(0, len(values), _PIECE):
        yield values[start : start + _PIECE]
        await asyncio.sleep(0)
