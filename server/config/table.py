"""The tables of docs/settings.md."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from server.config.allowed import allowed_values
from server.config.settings import AREAS


def settings_table() -> str:
    """Return a table for each area of settings, in Markdown, each below a heading."""
    lines: list[str] = []
    for title, area in AREAS.items():
        lines += [f"## {title}", ""]
        lines += ["| Setting | Default | Allowed | Meaning |", "|---|---|---|---|"]
        lines += [_row(name, field) for name, field in area.model_fields.items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def _row(name: str, field: FieldInfo) -> str:
    default, allowed = _default_text(field), allowed_values(field)
    return f"| `{name}` | {default} | {allowed} | {field.description} |"


def _default_text(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "default_text" in extra:
        return str(extra["default_text"])
    match field.default:
        case None | {} | ():
            return "none"
        case bool():
            return f"`{str(field.default).lower()}`"
        case _:
            return f"`{field.default}`"
