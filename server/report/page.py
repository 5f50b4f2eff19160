"""The page of a report: one file of HTML that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, StrictUndefined

from server.report.blocks import Block, Paragraph, Plot, Table
from server.report.document import ReportDocument, SectionResult
from server.report.sections import Section


@dataclass(frozen=True, slots=True)
class Part:
    """A section with its result, and its blocks, each with the SVG of those that are plots."""

    section: Section
    result: SectionResult
    blocks: Sequence[tuple[Block, str]]


def page(document: ReportDocument, parts: Sequence[Part]) -> str:
    """Return the page as HTML."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["paragraph"] = lambda block: isinstance(block, Paragraph)
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["plot"] = lambda block: isinstance(block, Plot)
    environment.filters["duration"] = _duration
    template = environment.from_string(
        resources.files("server.report").joinpath("page.html").read_text("utf-8")
    )
    return template.render(
        document=document,
        parts=parts,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(document.created_at)),
        missing=[part for part in parts if part.result.status != "done"],
        seconds=sum(part.result.seconds for part in parts),
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
