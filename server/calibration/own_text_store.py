"""Text that a model has written itself, kept for the next start."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from server.calibration.text_windows import WINDOW
from server.state import JsonEntry, StateDirectory
from server.state_keys import own_text_key

# Tokens of a document, at most.
LENGTH = WINDOW
SEED = 0
_KIND = "own-text"


class OwnTextStore:
    """Keeps what one model has written to be calibrated on, so that it writes it once."""

    def __init__(self, state_dir: Path, *, model: str, tokenizer: str, num_tokens: int) -> None:
        """Keep ``num_tokens`` tokens of text; ``model`` and ``tokenizer`` are fingerprints."""
        self._state = StateDirectory(state_dir)
        self._key = own_text_key(
            model=model, tokenizer=tokenizer, num_tokens=num_tokens, length=LENGTH, seed=SEED
        )
        self._entry = JsonEntry(list[str], self._key)

    def kept(self) -> list[str] | None:
        """Return the documents, None where there are none."""
        return self._state.load(_KIND, self._key, self._entry)

    async def kept_or_written(self, write: Callable[[], Awaitable[list[str]]]) -> list[str]:
        """Return the documents; if there are none, ``write`` them first."""
        return await self._state.load_or_make(_KIND, self._key, self._entry, write)
