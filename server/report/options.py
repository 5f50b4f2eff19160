"""What a report is asked for, beside the settings of the server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.evaluation.multiple_choice import Question


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """``sections``: names of those to run; empty: all. ``heal_steps`` of 0: no healing."""

    out: Path
    budget_seconds: float = math.inf
    sections: Sequence[str] = ()
    # By the name of the file.
    questions: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    heal_steps: int = 0
