"""Values of flags and variables, which are text, for settings of other types.

Each function returns a value that is no text as it is: the field checks it.
"""

from __future__ import annotations

import json

from server.config.errors import not_allowed


def object_from(value: object) -> object:
    """Read a JSON object."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise not_allowed("a JSON object") from None


def pairs_from(value: object, allowed: str) -> object:
    """Read NAME=VALUE, separated by commas, or a JSON object."""
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        return object_from(value)
    pairs: dict[str, str] = {}
    for item in value.split(","):
        name, equals, each = item.strip().partition("=")
        if not equals or name in pairs:
            raise not_allowed(allowed)
        pairs[name] = each
    return pairs


def names_from(value: object) -> object:
    """Read names, separated by commas."""
    if not isinstance(value, str):
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())


def number_from(value: object) -> object:
    """Read a whole number; Literal takes none from a text."""
    try:
        return int(value) if isinstance(value, str) else value
    except ValueError:
        return value
