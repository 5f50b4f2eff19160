"""What the probes of one depth found."""

from __future__ import annotations

from dataclasses import dataclass

from pruning.probes.choosing import Choosing
from pruning.probes.writing import Writing


@dataclass(frozen=True, slots=True)
class Probes:
    """How one depth writes and chooses; None: there was too little text for that probe."""

    writing: Writing | None
    choosing: Choosing | None

    @property
    def has_dense(self) -> bool:
        """Whether all that was found was compared with the dense model."""
        writing, choosing = self.writing, self.choosing
        return (writing is None or writing.ratio is not None) and (
            choosing is None or choosing.agreement is not None
        )
