"""What a section shows: paragraphs, tables and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts under headings; ``of_paper``: the figures are the paper's, not measured."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    of_paper: bool = False

    @property
    def are_words(self) -> list[bool]:
        """Whether each column has words in it, which are read from the left, unlike numbers."""
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.headings)
        return [any(cell[:1].isalpha() for cell in column) for column in columns]


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot; ``draw`` is called with a figure of matplotlib and one pair of axes on it.

    ``name`` is that of its files. ``title`` says what it shows, also to who cannot see it.
    """

    name: str
    title: str
    draw: Callable[[Any, Any], None]


Block = Paragraph | Table | Plot


def not_measured(missing: Iterable[tuple[str, str]]) -> list[Paragraph]:
    """Return a paragraph for each reason, with the names of all that it keeps from being measured.

    ``missing`` has a name and a reason each.
    """
    names: dict[str, list[str]] = {}
    for name, why in missing:
        names.setdefault(why, []).append(name)
    return [
        Paragraph(f"Not measured: {', '.join(those)}; because {why}.")
        for why, those in names.items()
    ]


# Places beyond the usual ones that a standard error may take.
_MORE_PLACES = 3


def number(value: float | None, digits: int = 3) -> str:
    """Return the value with so many significant digits; a dash where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "∞" if value > 0 else "-"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    places = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{places}f}"


def with_error(value: float, stderr: float | None, places: int = 4) -> str:
    """Return both with so many places, or with as many as a smaller error needs to be seen."""
    if stderr and math.isfinite(stderr):
        places = min(max(places, -math.floor(math.log10(abs(stderr)))), places + _MORE_PLACES)
    return f"{value:.{places}f}" if stderr is None else f"{value:.{places}f} ± {stderr:.{places}f}"


def percent(value: float | None, places: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{places}f} %"
