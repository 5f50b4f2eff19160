"""Settings that have had another name, which is accepted for one release."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping

# The old name of a setting to its present one.
OLD_NAMES = {"max_unread": "max_buffered_tokens"}

logger = logging.getLogger(__name__)


def rename_old(values: MutableMapping[str, object]) -> set[str]:
    """Put present names in place of old ones, and return the old ones that there were.

    Where a setting is given under both names, the value of the present one counts.
    """
    used = OLD_NAMES.keys() & values.keys()
    for old in used:
        values.setdefault(OLD_NAMES[old], values.pop(old))
    return used


def warn_of_old_names(used: frozenset[str]) -> None:
    """Log a warning for each old name."""
    for old in sorted(used):
        logger.warning(
            "the setting %s is called %s now; the old name is accepted for one release, "
            "as a flag, a variable and a key",
            old,
            OLD_NAMES[old],
        )
