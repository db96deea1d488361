"""Heat maps of shares: which experts the images of each class, or those in each layer, go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import COLORMAP, new_figure, style

#: Cells are labelled with their numbers where there is room for them.
_LABELLED_COLUMNS = 8
_LABELLED_ROWS = 40
#: Of a figure, in inches.
_HIGHEST = 9.0


def draw_loads(
    loads: Mapping[str, np.ndarray], rows: Sequence[str], title: str, row_kind: str = 'class', counted: str = 'images'
) -> Figure:
    """Draw the shares that each expert gets, row by row, side by side for several situations.

    Args:
        loads (Mapping): Under the name of each situation, such as ``'clean'`` and ``'under attack'``, the shares
            (R, N) in [0, 1]; each row sums to 1, or is NaN where there was nothing to share.
        rows (Sequence[str]): Names of the R rows.
        title (str): Title of the figure.
        row_kind (str): What the rows are.
        counted (str): What the shares are of.

    Raises:
        ValueError: There is no situation, or its shape does not fit the names of the rows.
    """
    if not loads:
        raise ValueError(f'there are no loads to draw in {title!r}')
    for name, load in loads.items():
        if load.ndim != 2 or len(load) != len(rows):
            raise ValueError(f'the load {name!r} has shape {load.shape}, but there are {len(rows)} rows')
    with style():
        figure = new_figure(height=min(max(2.4, 1.3 + 0.26 * len(rows)), _HIGHEST))
        figure.suptitle(title, fontsize=10)
        panels = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
        for axes, (name, load) in zip(panels, loads.items()):
            picture = axes.imshow(load, cmap=COLORMAP, vmin=0, vmax=1, aspect='auto', interpolation='nearest')
            axes.set_title(name, fontsize=9)
            axes.set(xlabel='expert', xticks=range(load.shape[1]))
            axes.grid(False)
            if load.shape[1] * len(loads) <= _LABELLED_COLUMNS and len(rows) <= _LABELLED_ROWS:
                _label_cells(axes, load)
        if len(rows) <= _LABELLED_ROWS:
            panels[0].set_yticks(range(len(rows)), [str(name) for name in rows])
        panels[0].set_ylabel(row_kind)
        figure.colorbar(picture, ax=list(panels), label=f'share of {counted}', format='{x:.0%}', shrink=0.9)
    return figure


def _label_cells(axes: Axes, load: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(load):
        if np.isfinite(share):
            # The upper half of the colour map is light.
            color = 'black' if share > 0.5 else 'white'
            axes.text(column, row, f'{share:.0%}', ha='center', va='center', color=color, fontsize=7)
