"""Plots of measurements, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.report.matplotlib_check import check_matplotlib
from server.report.plots import use_log


def save_lines(
    stem: Path,
    lines: Mapping[str, Mapping[float, float]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    dashed: Sequence[str] = (),
    from_zero: bool = True,
    log_x: bool = False,
    log_y: bool = False,
) -> list[Path]:
    """Plot each line's y by x, those named in ``dashed`` without marks; return the files.

    The y axis begins at 0 or, if not ``from_zero`` or logarithmic, a little below the least y.
    """
    figure, axes = _figure(title, x_label, y_label)
    for name, points in lines.items():
        xs = sorted(points)
        style = {"linestyle": "--"} if name in dashed else {"marker": "o"}
        axes.plot(xs, [points[x] for x in xs], label=name, **style)
    if from_zero and not log_y:
        axes.set_ylim(bottom=0)
    if log_x:
        use_log(axes.xaxis)
    if log_y:
        use_log(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _save(figure, stem)


def save_bars(
    stem: Path, bars: Mapping[str, Mapping[str, float]], *, x_label: str, title: str
) -> list[Path]:
    """Plot one stacked bar for each entry, of its named parts; return the files."""
    figure, axes = _figure(title, x_label, "")
    names = list(bars)
    left = [0.0] * len(names)
    for part in dict.fromkeys(part for parts in bars.values() for part in parts):
        widths = [bars[name].get(part, 0.0) for name in names]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    if any(len(parts) > 1 for parts in bars.values()):
        axes.legend(fontsize="small")
    return _save(figure, stem)


def _figure(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _save(figure: Any, stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths
