"""Progress of measurements that run many requests at once."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.base import ProgressCallback


class TokenProgress:
    """Counts measured tokens for a callback."""

    def __init__(
        self, callback: ProgressCallback, windows: Sequence[Sequence[int]], num_passes: int = 1
    ) -> None:
        self._callback = callback
        self._total = num_passes * sum(map(len, windows))
        self._done = 0

    def advance(self, num_tokens: int) -> None:
        self._done += num_tokens
        self._callback(self._done, self._total)

    def finish(self) -> None:
        """Report that nothing is left to do, where not all tokens were needed."""
        self.advance(self._total - self._done)
