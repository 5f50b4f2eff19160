"""Formats of log lines: text for people, JSON for programs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from pythonjsonlogger.json import JsonFormatter

# The attribute of a log record that holds the fields beside the message.
FIELDS = "fields"


def with_fields(fields: Mapping[str, object]) -> dict[str, object]:
    """Return the argument ``extra`` of a logging call with these fields."""
    return {FIELDS: dict(fields)}


class TextLines(logging.Formatter):
    """Text lines: the message, then the fields as ``name=value``."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        fields: dict[str, object] = getattr(record, FIELDS, {})
        return " ".join([line, *(f"{name}={_plain(value)}" for name, value in fields.items())])


class JsonLines(JsonFormatter):
    """JSON lines: one object on each line, with a traceback, if there is one, in ``exc_info``."""

    def __init__(self) -> None:
        super().__init__(
            "%(levelname)s %(name)s %(message)s",
            rename_fields={"levelname": "level", "name": "logger"},
            timestamp=True,
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        fields = log_data.pop(FIELDS, {})
        return {**fields, **log_data}


def _plain(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    # A value with a space or a quote could make one field look like two.
    is_safe = text and text.isprintable() and not set(text) & set(' "=\\')
    return text if is_safe else json.dumps(text)
