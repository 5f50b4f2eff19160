"""What searches for layers have found, kept between starts."""

from __future__ import annotations

from collections.abc import Sequence

from pruning.fingerprint import token_fingerprint
from server.calibration.layer_search import SearchedLosses
from server.state import JsonEntry, StateDirectory
from server.state_keys import Measuring, search_key

_KIND = "search"


class SearchStore:
    """Keeps the losses that searches with one model have measured, by the text they used."""

    def __init__(self, state: StateDirectory, measuring: Measuring) -> None:
        self._state = state
        self._measuring = measuring

    def on(self, windows: Sequence[Sequence[int]], repair: str | None) -> SearchOnText:
        """Return what is kept of searches on ``windows``, with these repair maps or none."""
        key = search_key(self._measuring, tokens=token_fingerprint(windows), repair=repair or "")
        return SearchOnText(self._state, key)


class SearchOnText:
    """One entry; see :class:`server.calibration.layer_search.KeptSearch`."""

    def __init__(self, state: StateDirectory, key: dict[str, object]) -> None:
        self._state = state
        self._key = key
        self._entry = JsonEntry(SearchedLosses, key)

    def load(self) -> SearchedLosses | None:
        return self._state.load(_KIND, self._key, self._entry)

    def save(self, searched: SearchedLosses) -> None:
        self._state.save(_KIND, self._key, self._entry, searched)
