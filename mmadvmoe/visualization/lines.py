"""Line charts whose lines differ by colour, mark and stroke."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from matplotlib.figure import Figure

from .style import MARKERS, PALETTE, single_axes, style

_STROKES = ('-', '--', ':', '-.')
#: With more points than this, marks on a line would hide it.
_MARKED_POINTS = 25


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: What it is called in the legend.
        x, y: Its points.
        color: Which colour and mark it has, as an index; lines that belong together may share it.
        stroke: Which kind of stroke it has, as an index.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    stroke: int = 0


def draw_lines(
    lines: Sequence[Line],
    title: str,
    xlabel: str,
    ylabel: str,
    limits: Optional[tuple[float, float]] = None,
    log: bool = False,
    log_x: bool = False,
) -> Figure:
    """Draw a chart of lines, its x axis from 0, with the legend below it, where it hides no point.

    Args:
        lines (Sequence[Line]): What to draw, in the order of the legend.
        title, xlabel, ylabel (str): Texts.
        limits (tuple, optional): Ends of the y axis. Defaults to what the lines need.
        log (bool): Whether the y axis is logarithmic.
        log_x (bool): Whether the x axis is logarithmic, with the x of the points as its ticks,
            rather than from 0.

    Raises:
        ValueError: There is no line.
    """
    if not lines:
        raise ValueError(f'there is no line to draw in {title!r}')
    with style():
        legend_rows = (len(lines) + 1) // 2
        figure, axes = single_axes(2.9 + 0.18 * legend_rows, title, xlabel, ylabel)
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                label=line.label,
                color=PALETTE[line.color % len(PALETTE)],
                linestyle=_STROKES[line.stroke % len(_STROKES)],
                marker=MARKERS[line.color % len(MARKERS)] if len(line.x) <= _MARKED_POINTS else None,
                linewidth=1.6,
            )
        if log:
            axes.set_yscale('log')
        if log_x:
            axes.set_xscale('log')
            ticks = sorted({x for line in lines for x in line.x})
            axes.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
            axes.set_xticks([], minor=True)
        else:
            axes.set_xlim(left=0)
        if limits is not None:
            axes.set_ylim(*limits)
        figure.legend(loc='outside lower center', ncols=min(2, len(lines)))
    return figure
