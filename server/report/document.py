"""The report as numbers: what ``report.json`` holds."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION = 1

# done: all of it was measured; partial: the time did not suffice; skipped: it cannot be had here,
# or was not asked for.
Status = Literal["done", "partial", "skipped"]


class SectionResult(BaseModel):
    """What one section measured; ``seconds`` of all runs together."""

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    status: Status
    # Why it is not done; empty where it is.
    reason: str = ""
    seconds: float = 0.0
    numbers: dict[str, Any] = Field(default_factory=dict)


class ReportDocument(BaseModel):
    """One report. Numbers that are not finite are None."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    created_at: float
    model: dict[str, Any]
    settings: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]
    sections: list[SectionResult]

    def to_json(self) -> str:
        return json.dumps(_finite(self.model_dump()), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
