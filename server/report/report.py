"""One run of a report: the sections one after the other, and the page after each of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from server.calibration.hardware import describe_hardware
from server.calibration.versions import measuring_versions
from server.config import Settings
from server.errors import InvalidArgument
from server.model.inputs import StartError, refused_as
from server.report.blocks import Block, Plot
from server.report.budget import BudgetSpent
from server.report.document import ReportDocument, SectionResult, Status
from server.report.lab import Lab
from server.report.matplotlib_check import check_matplotlib
from server.report.not_possible import NotPossible
from server.report.options import ReportOptions
from server.report.output import PLOTS, ReportDirectory
from server.report.page import Part, page
from server.report.plots import save_plot
from server.report.sections import SECTIONS, Section
from server.report.subject import find_subject
from server.telemetry.progress import ProgressReport

OUT_OF_TIME = "the time of --budget-seconds was spent; another run goes on from here"
NOT_ASKED = "not asked for in this run"
NOT_REACHED = "not reached yet; the run goes on, or another one goes on from here"

logger = logging.getLogger(__name__)


def chosen_sections(names: Sequence[str]) -> list[Section]:
    """Return the sections of these names, or all; raises :class:`InvalidArgument`."""
    known = {section.name: section for section in SECTIONS}
    for name in names:
        if name not in known:
            raise InvalidArgument("section", name, ", ".join(known))
    return [section for section in SECTIONS if not names or section.name in names]


class Report:
    """Measures a model and writes the page."""

    def __init__(
        self, settings: Settings, options: ReportOptions, progress: ProgressReport
    ) -> None:
        """Check what is asked for, before anything is measured.

        Raises :class:`StartError`, which names what is wrong, and :class:`MatplotlibMissing`.
        """
        check_matplotlib()
        with refused_as("report"):
            self._sections = chosen_sections(options.sections)
        self._subject = find_subject(settings)
        with refused_as("OUT"):
            self._directory = ReportDirectory(options.out, self._subject.fingerprint)
        self._settings = settings
        self._options = options
        self.lab = Lab(settings, options, self._subject, self._directory, progress)
        self._drawn: dict[str, tuple[dict[str, Any], list[tuple[Block, str]]]] = {}
        earlier = self._directory.earlier()
        self._results = {} if earlier is None else {each.name: each for each in earlier.sections}

    async def run(self) -> Path:
        """Measure what is not kept, as far as there is time, and return the page.

        Raises :class:`StartError` where the model cannot be measured at all.
        """
        try:
            for section in self._sections:
                self._results[section.name] = await self._measured(section)
                self._save()
        finally:
            await self.lab.close()
        return self._save()

    async def _measured(self, section: Section) -> SectionResult:
        numbers: dict[str, Any] = {}
        status: Status = "done"
        reason = ""
        started = time.monotonic()
        logger.info("section %s: %s", section.name, section.title)
        try:
            await section.run(self.lab, numbers)
        except BudgetSpent:
            status, reason = "partial", OUT_OF_TIME
        except NotPossible as error:
            status, reason = "skipped", str(error)
        except StartError as error:
            if section is SECTIONS[0]:
                raise
            status, reason = "skipped", str(error)
        earlier = self._results.get(section.name)
        return SectionResult(
            name=section.name,
            title=section.title,
            status=status,
            reason=reason,
            seconds=time.monotonic() - started + (earlier.seconds if earlier else 0.0),
            numbers=numbers,
        )

    def _save(self) -> Path:
        document = ReportDocument(
            created_at=time.time(),
            model=self._subject.describe(),
            settings=self._described_settings(),
            hardware=describe_hardware(),
            versions=measuring_versions(),
            sections=[
                self._results.get(section.name)
                or SectionResult(
                    name=section.name,
                    title=section.title,
                    status="skipped",
                    reason=NOT_REACHED if section in self._sections else NOT_ASKED,
                )
                for section in SECTIONS
            ],
        )
        self._directory.save(document)
        # As they are read again: without numbers that are not finite.
        shown = ReportDocument.model_validate_json(document.to_json())
        return self._directory.save_page(page(shown, list(self._parts(shown))))

    def _parts(self, document: ReportDocument) -> Iterator[Part]:
        plots = self._directory.path / PLOTS
        for section, result in zip(SECTIONS, document.sections, strict=True):
            numbers, drawn = self._drawn.get(section.name, (None, []))
            if numbers != result.numbers:  # drawing takes about a second for each plot
                blocks = section.render(result.numbers)
                drawn = [(block, _drawn(block, plots)) for block in blocks]
                self._drawn[section.name] = result.numbers, drawn
            yield Part(section, result, drawn)

    def _described_settings(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "calibration": settings.calibration or "the documentation of Python",
            "calibration_tokens": settings.calibration_tokens,
            "quality_text": settings.quality_text or "a held-out part of it",
            "quality_tokens": settings.quality_tokens,
            "search_tokens": settings.search_tokens,
            "questions": {name: len(each) for name, each in self._options.questions.items()},
            "heal_steps": self._options.heal_steps,
        }


def _drawn(block: Block, directory: Path) -> str:
    return save_plot(block, directory) if isinstance(block, Plot) else ""
