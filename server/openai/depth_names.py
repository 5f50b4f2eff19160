"""Depths as clients of OpenAI's API write them: in the model's name, a field or a header.

======================  ===========================================
``name``                the default
``name:fast``           a level
``name:auto``           the server chooses
``name@12``             12 layers
``name@0.25``           without a quarter of the layers
``name@16/8``           16 layers for the prompt, 8 for the answer
======================  ===========================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from server.depth.depth_choice import Auto, DepthChoice, Layers, NamedLevel, PruneRatio
from server.errors import InvalidArgument
from server.openai.failures import UnknownModel

# A depth, and one for the prompt; None: it is not named.
Depths = tuple[DepthChoice, DepthChoice]

HEADER = "x-fathom-depth"
# The fields of a body that say something about the depth.
FIELDS = frozenset({"depth", "prefill_depth", "max_quality_loss"})

_ALLOWED = (
    "a number of layers, a prune ratio, the name of a level, auto, or PREFILL/DECODE of the first "
    "three"
)
_LAYERS = re.compile(r"[0-9]{1,9}")
_RATIO = re.compile(r"[0-9]?\.[0-9]{1,20}")
# The longest name of a level has 64 characters.
_MAX_CHARACTERS = 130


def depths_asked(body: Mapping[str, Any], header: str | None, model: str, base: str) -> Depths:
    """Return the depths of a request.

    A field of the body counts more than the header, and the header more than the model's name.
    Raises :class:`UnknownModel`, and :class:`InvalidArgument`, naming the field.
    """
    depth, prefill_depth = depths_of_model(model, base)
    if header is not None:
        depth, prefill_depth = _depths(header, HEADER)
    if body.get("depth") is not None:
        depth, prefill_depth = _depths(body["depth"], "depth")
    if body.get("prefill_depth") is not None:
        prefill_depth = _one_depth(body["prefill_depth"], "prefill_depth")
    if (loss := body.get("max_quality_loss")) is not None:
        if not isinstance(loss, int | float) or isinstance(loss, bool) or not loss >= 0:
            raise InvalidArgument("max_quality_loss", loss, "0 or more")
        if depth is not None and not isinstance(depth, Auto):
            allowed = "none beside a depth: it is for depth auto, which it implies"
            raise InvalidArgument("max_quality_loss", loss, allowed)
        depth = Auto(float(loss))
    return depth, prefill_depth


def depths_of_model(name: str, base: str) -> Depths:
    """Read a model's name; an empty one is that of the model."""
    if name in ("", base):
        return None, None
    if len(name) - len(base) <= _MAX_CHARACTERS:
        rest = name[len(base) + 1 :]
        if name.startswith(f"{base}:") and rest:
            return (Auto() if rest == "auto" else NamedLevel(rest)), None
        if name.startswith(f"{base}@") and all(map(_is_number, rest.split("/", 1))):
            return _depths(rest, "model")
    raise UnknownModel(name, base)


def _depths(value: object, field: str) -> Depths:
    if isinstance(value, str) and "/" in value:
        prefill, _, decode = value.partition("/")
        return _one_depth(decode, field), _one_depth(prefill, field)
    return _one_depth(value, field), None


def _one_depth(value: object, field: str) -> DepthChoice:
    match value:
        case bool():
            pass
        case int():
            return Layers(value)
        case float():
            return PruneRatio(value)
        case "auto" if field != "prefill_depth":
            return Auto()
        case str() if _LAYERS.fullmatch(value):
            return Layers(int(value))
        case str() if _RATIO.fullmatch(value):
            return PruneRatio(float(value))
        case str() if 0 < len(value) <= _MAX_CHARACTERS:
            return NamedLevel(value)
    raise InvalidArgument(field, value, _ALLOWED)


def _is_number(text: str) -> bool:
    return _LAYERS.fullmatch(text) is not None or _RATIO.fullmatch(text) is not None
