"""``fathom serve``."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from server.cli.problems import report_problem
from server.config import OLD_NAMES, Settings, allowed_values, load_settings


def serve(**flags: Any) -> None:
    """Serve a model over gRPC until SIGTERM or Ctrl-C.

    Every flag may also be given as a variable, such as FATHOM_PORT, or in the file of --config.
    """
    settings = load_settings(flags)

    # Imported here to keep the other commands quick.
    from server import app
    from server.model.inputs import StartError

    try:
        app.serve(settings, lambda: load_settings(flags))
    except StartError as error:
        report_problem(str(error))
        sys.exit(2)


def _flags() -> list[inspect.Parameter]:
    """Return one parameter for each setting. Values stay text: the settings check them."""
    fields = Settings.model_fields
    old = {name: fields[present] for name, present in OLD_NAMES.items()}
    return [
        *(_flag(name, field) for name, field in fields.items()),
        *(_flag(name, field, hidden=True) for name, field in old.items()),
    ]


def _flag(name: str, field: FieldInfo, *, hidden: bool = False) -> inspect.Parameter:
    kind: Any = bool if field.annotation is bool else str
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=field.description,
        metavar=None if kind is bool else _metavar(allowed_values(field)),
        show_default=False,
        hidden=hidden,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _metavar(allowed: str) -> str:
    if "," in allowed and " " not in allowed.replace(", ", ""):
        return "|".join(allowed.split(", "))
    return {"a path": "PATH", "an existing file": "FILE"}.get(allowed) or (
        "NUMBER" if any(character.isdigit() for character in allowed) else "TEXT"
    )


# The flags are made from the settings, so that neither can have what the other lacks.
serve.__signature__ = inspect.Signature(_flags())  # type: ignore[attr-defined]
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _flags()}
