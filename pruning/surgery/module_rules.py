"""Rules of quantization configurations that name modules, and the layers in them.

GPTQModel's ``dynamic``, ``modules_to_not_convert``, ``ignore`` and others hold module names,
parts of them or regular expressions over them, as list items or as keys.
"""

from __future__ import annotations

import re
from typing import Any

from pruning.surgery.errors import SurgeryError
from pruning.surgery.layer_map import LayerMap

_CLASS = r"[0-9]|\\d|\[[\^\\d0-9-]+\]"
_REPEATED = r"[*+?]|\{[0-9,]+\}"
# The number of a layer in names and regular expressions, with a wildcard behind it that may match
# more digits.
_NUMBER = re.compile(
    rf"(?:(?:{_CLASS}|\((?:\?:)?(?:{_CLASS}|{_REPEATED}|\|)+\))(?:{_REPEATED})?)+"
    rf"(?P<wildcard>\.(?:{_REPEATED}))?"
)


def renumber_rules(value: Any, list_name: str, layers: LayerMap) -> Any:
    """Return ``value``, any JSON, with the layers renumbered in its keys and list items.

    ``list_name`` is what the list of layers is called in module names, such as ``layers``.
    Rules that concern only removed layers are dropped. Raises :class:`SurgeryError` for a rule
    whose layers are not clear.
    """
    match value:
        case dict():
            renumbered: dict[str, Any] = {}
            for key, item in value.items():
                if (new := _renumber(key, list_name, layers)) is not None:
                    # If rules have become equal, the first one applies, as before.
                    renumbered.setdefault(new, renumber_rules(item, list_name, layers))
            return renumbered
        case list():
            items = (_renumber(i, list_name, layers) if isinstance(i, str) else i for i in value)
            return [
                item if isinstance(item, str) else renumber_rules(item, list_name, layers)
                for item in items
                if item is not None
            ]
        case _:
            return value


def _renumber(rule: str, list_name: str, layers: LayerMap) -> str | None:
    """Return the rule for the new numbers, None if it concerns only removed layers."""
    head = re.search(rf"(?<!\w){re.escape(list_name)}(?:\\\.|\.|\[\.\])", rule)
    if head is None:
        return rule
    match = _NUMBER.match(rule, head.end())
    if match is None:
        if rule.startswith("(", head.end()):
            raise SurgeryError(
                f"quantization_config: found {rule!r}, allowed: rules in which the number of the "
                "layer is an expression of its own"
            )
        return rule  # of any layer
    number = re.compile(match[0])
    named = [layer for layer in range(layers.num_layers) if number.fullmatch(str(layer))]
    if not named or len(named) == layers.num_layers:
        return rule
    kept = [str(layer) for layer in layers.renumber(named)]
    if not kept:
        return None
    new = kept[0] if match[0].isdecimal() else f"(?:{'|'.join(kept)})"
    if match["wildcard"]:
        new += f"(?![0-9]){match['wildcard']}"
    return rule[: match.start()] + new + rule[match.end() :]
