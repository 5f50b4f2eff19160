"""The interface of a section."""

from __future__ import annotations

from typing import Any, Protocol

from server.report.blocks import Block
from server.report.lab import Lab

Numbers = dict[str, Any]


class Section(Protocol):
    """One experiment. ``measures`` says in one or two sentences what, for the page."""

    @property
    def name(self) -> str:
        """What ``--section`` and ``report.json`` call it."""

    @property
    def title(self) -> str: ...

    @property
    def measures(self) -> str: ...

    async def run(self, lab: Lab, numbers: Numbers) -> None:
        """Put what is measured into ``numbers``, which JSON can hold, as soon as it is known.

        Raises :class:`BudgetSpent` where the time does not suffice for all of it, and
        :class:`NotPossible` where nothing, or nothing more, can be measured.
        """

    def render(self, numbers: Numbers) -> list[Block]:
        """Return what is to be shown of ``numbers``, which may lack what was not measured."""
