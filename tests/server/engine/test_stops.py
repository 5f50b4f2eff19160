"""Stops of a request, and the reported reason why its text ended."""

from __future__ import annotations

import pytest

from server.engine.base import SamplingOptions
from server.engine.stops import Stops
from server.errors import InvalidArgument

SPECIAL = {"<|end|>": 7, "<s>": 1}


def test_a_special_token_stops_by_its_id() -> None:
    stops = Stops.of(SamplingOptions(stop=("<|end|>", "so"), stop_token_ids=(9,)), SPECIAL)
    assert (stops.strings, stops.token_ids) == (("so",), (9, 7))
    assert stops.stopped_by(7, 7) == "<|end|>"
    assert stops.stopped_by(None, 7) == "<|end|>"  # it is the model's end of text, too
    assert stops.stopped_by("so", 3) == "so"
    assert stops.stopped_by(9, 9) == 9


def test_only_what_the_request_named_is_reported() -> None:
    stops = Stops.of(SamplingOptions(stop_token_ids=(2,)), SPECIAL, ("###", "<|end|>"))
    assert stops.strings == ("###",)
    assert stops.token_ids == (2, 7)
    assert stops.stopped_by("###", 5) is None
    assert stops.stopped_by(7, 7) is None
    assert stops.stopped_by(11, 11) is None  # an end of text of the model's
    assert stops.stopped_by(None, 2) == 2  # named, though it is the model's end of text
    assert stops.stopped_by(None, None) is None


@pytest.mark.parametrize("string", ["a<|end|>", "<|end|>\n", "<s><s>"])
def test_a_string_that_cannot_be_found_is_refused(string: str) -> None:
    with pytest.raises(InvalidArgument, match=r"stop.stop\[1\]: .*special tokens are no part"):
        Stops.of(SamplingOptions(stop=("fine", string)), SPECIAL)
