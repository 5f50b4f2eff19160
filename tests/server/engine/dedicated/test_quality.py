"""Sums over a text window."""

from __future__ import annotations

from server.engine.dedicated.quality import WindowStatistics


def test_agreement_is_with_the_reference() -> None:
    window = WindowStatistics(3, 4.5, (7, 8, 9))
    assert window.sums(window) == (3.0, 4.5, 3.0, None, 4.5)
    assert window.sums(WindowStatistics(3, 1.0, (7, 0, 9))) == (3.0, 4.5, 2.0, None, 1.0)


def test_without_a_reference_there_is_no_agreement() -> None:
    assert WindowStatistics(3, 4.5, (7, 8, 9)).sums(None) == (3.0, 4.5, None, None)
