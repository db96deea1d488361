"""What became of all images, as parts of one bar for each model."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from .style import PALETTE, single_axes, style

_HATCHES = ('', '///', '...', 'xx')
#: Narrower parts have no room for their number.
_LABELLED_SHARE = 0.06


def draw_parts(parts: Mapping[str, Mapping[str, float]], title: str, xlabel: str) -> Figure:
    """Draw a stacked bar for each model; its parts differ by colour and by pattern.

    Args:
        parts (Mapping): Under the name of each model, its parts: counts under their names, the same names for all.
        title (str): Title of the figure.
        xlabel (str): What is counted, in percent.

    Raises:
        ValueError: There is no model, or one without images.
    """
    if not parts or not all(sum(of_model.values()) > 0 for of_model in parts.values()):
        raise ValueError(f'there is nothing to draw in {title!r}: {dict(parts)!r}')
    with style():
        names = list(next(iter(parts.values())))
        figure, axes = single_axes(1.5 + 0.45 * len(parts) + 0.2 * len(names), title, xlabel)
        for row, of_model in enumerate(parts.values()):
            whole, left = sum(of_model.values()), 0.0
            for index, name in enumerate(names):
                share = of_model[name] / whole
                axes.barh(
                    row,
                    100 * share,
                    left=100 * left,
                    height=0.6,
                    color=PALETTE[index % len(PALETTE)],
                    hatch=_HATCHES[index % len(_HATCHES)],
                    edgecolor='white',
                    linewidth=0.5,
                    label=name if row == 0 else None,
                )
                if share >= _LABELLED_SHARE:
                    box = dict(facecolor='white', edgecolor='none', pad=1.5)
                    middle = 100 * (left + share / 2)
                    axes.text(middle, row, f'{share:.0%}', ha='center', va='center', fontsize=8, bbox=box)
                left += share
        axes.set_yticks(range(len(parts)), list(parts))
        axes.set_ylim(len(parts) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.grid(axis='y', visible=False)
        figure.legend(loc='outside lower left', ncols=1)
    return figure
