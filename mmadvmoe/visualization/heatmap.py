"""Heat maps of shares: which experts the images of each class go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from .style import COLORMAP, new_figure, style

#: Cells are labelled with their numbers where there is room for them.
_LABELLED_COLUMNS = 8


def draw_load_per_class(
    loads: Mapping[str, np.ndarray], class_names: Sequence[str], title: str, counted: str = 'images'
) -> Figure:
    """Draw the share of the images of each class that each expert gets, side by side for several situations.

    Args:
        loads (Mapping): Under the name of each situation, such as ``'clean'`` and ``'under attack'``, the shares
            (K, N) in [0, 1]; each row sums to 1, or is NaN where the class has no image.
        class_names (Sequence[str]): Names of the K classes.
        title (str): Title of the figure.
        counted (str): What the shares are of.

    Raises:
        ValueError: There is no situation, or its shape does not fit the class names.
    """
    if not loads:
        raise ValueError(f'there are no loads to draw in {title!r}')
    for name, load in loads.items():
        if load.ndim != 2 or len(load) != len(class_names):
            raise ValueError(f'the load {name!r} has shape {load.shape}, but there are {len(class_names)} classes')
    with style():
        figure = new_figure(height=max(2.4, 1.3 + 0.26 * len(class_names)))
        figure.suptitle(title, fontsize=10)
        panels = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
        for axes, (name, load) in zip(panels, loads.items()):
            picture = axes.imshow(load, cmap=COLORMAP, vmin=0, vmax=1, aspect='auto', interpolation='nearest')
            axes.set_title(name, fontsize=9)
            axes.set(xlabel='expert', xticks=range(load.shape[1]))
            axes.grid(False)
            if load.shape[1] * len(loads) <= _LABELLED_COLUMNS:
                _label_cells(axes, load)
        panels[0].set_yticks(range(len(class_names)), [str(name) for name in class_names])
        panels[0].set_ylabel('class')
        figure.colorbar(picture, ax=list(panels), label=f'share of {counted}', format='{x:.0%}', shrink=0.9)
    return figure


def _label_cells(axes, load: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(load):
        if np.isfinite(share):
            # The upper half of the colour map is light.
            color = 'black' if share > 0.5 else 'white'
            axes.text(column, row, f'{share:.0%}', ha='center', va='center', color=color, fontsize=7)
