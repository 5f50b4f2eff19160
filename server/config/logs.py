"""Settings of logs and traces."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StringConstraints


class LogSettings(BaseModel):
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines that are written."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Whether log lines are text for people or JSON objects."
    )
    otlp_endpoint: Annotated[str, StringConstraints(pattern=r"^https?://.+")] | None = Field(
        None,
        description="Where traces go, over OTLP and gRPC, as `http://127.0.0.1:4317`; none: where "
        "the variables of OpenTelemetry say, if anywhere.",
    )
