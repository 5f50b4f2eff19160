"""The sections of a report, one file each, in the order of the page and of their usefulness."""

from __future__ import annotations

from server.report.sections.base import Section
from server.report.sections.depth import DepthQuality
from server.report.sections.healing import Healing
from server.report.sections.importance import Importance
from server.report.sections.metrics import Metrics
from server.report.sections.quantization import Quantization
from server.report.sections.recurrent import Recurrent
from server.report.sections.single_removal import SingleRemoval
from server.report.sections.sublayers import Sublayers
from server.report.sections.surface import Surface
from server.report.sections.tasks import Tasks

__all__ = ["SECTIONS", "Section"]

# They are run in this order, so what a short time suffices for comes first.
SECTIONS: tuple[Section, ...] = (
    Importance(),
    SingleRemoval(),
    DepthQuality(),
    Metrics(),
    Tasks(),
    Surface(),
    Sublayers(),
    Healing(),
    Quantization(),
    Recurrent(),
)
