"""Allowed values of a setting, in words."""

from __future__ import annotations

import math
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import StringConstraints
from pydantic.fields import FieldInfo
from pydantic.types import PathType


def allowed_values(field: FieldInfo) -> str:
    """Return the allowed values of a setting, in words."""
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: object, metadata: list[Any]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0], [*metadata, *arguments[1:]])
    if origin is Literal:
        return ", ".join(str(value) for value in arguments)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _allowed(inner, metadata)
    if annotation is bool:
        return "true, false"
    if annotation in (int, float):
        return _bounds(metadata)
    if any(isinstance(item, PathType) for item in metadata):
        return "an existing file"
    if annotation is Path:
        return "a path"
    if origin is dict:
        return "names with values"
    if any(isinstance(item, StringConstraints) and item.pattern for item in metadata):
        return "a URL with http:// or https://"
    if origin is tuple:
        return "names, separated by commas"
    return "text, not empty" if any(isinstance(item, MinLen) for item in metadata) else "text"


def _bounds(metadata: list[Any]) -> str:
    low = next((item.ge for item in metadata if isinstance(item, Ge)), None)
    above = next((item.gt for item in metadata if isinstance(item, Gt)), None)
    high = next((item.le for item in metadata if isinstance(item, Le)), math.inf)
    if above is not None:
        return f"more than {above}"
    return f"{low} or more" if high == math.inf else f"{low} to {high}"
