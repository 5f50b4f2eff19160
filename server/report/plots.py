"""Plots as files, and as SVG that a page holds."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from pruning.durable import replace_file
from server.report.blocks import Plot
from server.report.matplotlib_check import check_matplotlib

# Of Okabe and Ito, which most people can tell apart; they show on white and on black.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C", "#B59F00")
# Text and axes. The page replaces it by the colour of its own text.
_INK = "#1b1c1d"
_GRID = "#9b9c9d"
_STYLE = {
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.alpha": 0.35,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    # Text stays text: it can be read out and searched for.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
}
_SIZE_INCHES = (6.2, 3.7)
_DPI = 150
_FEW_DECADES = 1e3
# The highest value, divided by the lowest, below which there are at most two ticks.
_FEW_TICKS = 5.0
_ID = re.compile(r'(\bid="|url\(#|href="#)')


def use_log(axis: Any, *, linear_below: float | None = None) -> None:
    """Make ``axis`` logarithmic, with plain numbers at its ticks, once all has been drawn.

    It stays linear where its values are too close to each other for ticks at 1, 2, 5, 10 and so
    on. ``linear_below``: around 0 it is linear up to this value; None: all values are above 0.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    set_scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    if linear_below is None:
        if high < _FEW_TICKS * max(low, 0.0):
            return
        set_scale("log")
        low, high = axis.get_view_interval()
        steps = (1.0, 2.0, 5.0) if high / low < _FEW_DECADES else (1.0,)
        axis.set_major_locator(LogLocator(subs=steps))
    else:
        if max(-low, high) < _FEW_TICKS * linear_below:
            return
        set_scale("symlog", linthresh=linear_below)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def name_layers(axes: Any, last: int, label: str) -> None:
    """Make the x axis one of layers: from 0 to the ``last``, with ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.8, last + 0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(label)


def save_plot(plot: Plot, directory: Path) -> str:
    """Write ``plot`` as SVG and PNG; return the SVG as an element for a page.

    Raises :class:`MatplotlibMissing`, and :class:`OSError` where it cannot be written.
    """
    check_matplotlib()
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    style: Any = {**_STYLE, "svg.hashsalt": plot.name, "axes.prop_cycle": cycler(color=COLORS)}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.subplots()
        plot.draw(figure, axes)
        written = {}
        formats: tuple[tuple[str, dict[str, Any]], ...] = (
            ("svg", {"transparent": True, "metadata": {"Date": None}}),
            ("png", {"dpi": _DPI, "facecolor": "white"}),
        )
        for kind, options in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, **options)
            written[kind] = buffer.getvalue()
            replace_file(directory / f"{plot.name}.{kind}", written[kind])
    return _inline(written["svg"].decode(), plot)


def _inline(svg: str, plot: Plot) -> str:
    """Return the element alone, as wide as the page lets it be, in the page's own ink."""
    from html import escape

    element = svg[svg.index("<svg ") :].replace(_INK, "currentColor")
    # Several plots are in one page, so their ids must differ.
    element = _ID.sub(lambda found: f"{found[1]}{plot.name}-", element)
    head, rest = element.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    label = escape(plot.title, quote=True)
    return f'{head} role="img" aria-label="{label}">{rest}'
