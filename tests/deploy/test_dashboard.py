"""The dashboard that is checked in."""

from __future__ import annotations

import json

from deploy.dashboard import PATH, as_json


def test_it_is_current() -> None:
    assert PATH.read_text() == as_json(), "run python -m deploy.dashboard"


def test_panels_lie_beside_each_other() -> None:
    """None overlaps another, and rows are full."""
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(as_json())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
