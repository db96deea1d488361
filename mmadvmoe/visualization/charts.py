"""Line charts, stacked bars and heat maps, all readable without colour, and those of a training run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .style import COLORMAP, MARKERS, PALETTE, new_figure, plain, single_axes, style

_STROKES = ('-', '--', ':', '-.')
_HATCHES = ('', '///', '...', 'xx')
#: With more points than this, marks on a line would hide it.
_MARKED_POINTS = 25
#: Narrower parts of a bar have no room for their number.
_LABELLED_SHARE = 0.06
#: Heat maps with more columns or rows than this have no room for numbers and names.
_LABELLED_COLUMNS, _LABELLED_ROWS = 12, 40
#: Letters of names that have room below the columns; more are turned.
_LETTERS = 30
#: Height of a heat map, in inches.
_HIGHEST = 9.0


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name in the legend, its points, and the indices of colour (with its mark) and stroke.

    Lines that belong together may share a colour.
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
    limits: tuple[float, float] | None = None,
    log: bool = False,
    log_x: bool = False,
    mark: tuple[float, str] | None = None,
) -> Figure:
    """Draw a chart of lines, in the order of the legend below it, where it hides no point.

    ``limits`` are the ends of the y axis, which ``log`` makes logarithmic. The x axis begins at 0, or with ``log_x`` is
    logarithmic and has the x of the points as its ticks. ``mark`` is an x to draw a vertical line at, and its name.

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
                label=plain(line.label),
                color=PALETTE[line.color % len(PALETTE)],
                linestyle=_STROKES[line.stroke % len(_STROKES)],
                marker=MARKERS[line.color % len(MARKERS)] if len(line.x) <= _MARKED_POINTS else None,
                linewidth=1.6,
            )
        if mark is not None:
            axes.axvline(mark[0], color='black', linewidth=1.3, linestyle=(0, (1, 1.5)), label=plain(mark[1]), zorder=1)
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


def draw_parts(parts: Mapping[str, Mapping[str, float]], title: str, xlabel: str) -> Figure:
    """Draw a stacked bar for each model, in percent of ``xlabel``; its parts differ by colour and by pattern.

    ``parts`` holds, for each model, the count of each part; all models have the same parts.

    Raises:
        ValueError: There is no model, or one without images.
    """
    if not parts or not all(sum(counts.values()) > 0 for counts in parts.values()):
        raise ValueError(f'there is nothing to draw in {title!r}: {dict(parts)!r}')
    with style():
        names = list(next(iter(parts.values())))
        figure, axes = single_axes(1.5 + 0.45 * len(parts) + 0.2 * len(names), title, xlabel)
        counts = np.array([[of_model[name] for name in names] for of_model in parts.values()])
        shares = counts / counts.sum(axis=1, keepdims=True)
        box = dict(facecolor='white', edgecolor='none', pad=1.5)
        for index, name in enumerate(names):
            bars = axes.barh(
                range(len(parts)),
                100 * shares[:, index],
                left=100 * shares[:, :index].sum(axis=1),
                height=0.6,
                color=PALETTE[index % len(PALETTE)],
                hatch=_HATCHES[index % len(_HATCHES)],
                edgecolor='white',
                linewidth=0.5,
                label=plain(name),
            )
            numbers = [f'{share:.0%}' if share >= _LABELLED_SHARE else '' for share in shares[:, index]]
            axes.bar_label(bars, numbers, label_type='center', fontsize=8, bbox=box)
        axes.set_yticks(range(len(parts)), [plain(name) for name in parts])
        axes.set_ylim(len(parts) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.grid(axis='y', visible=False)
        figure.legend(loc='outside lower left', ncols=1)
    return figure


def draw_loads(
    loads: Mapping[str, np.ndarray],
    rows: Sequence[str],
    title: str,
    row_kind: str = 'class',
    counted: str = 'images',
    columns: str = 'expert',
    column_names: Sequence[str] | None = None,
) -> Figure:
    """Draw heat maps of the share of what is ``counted`` that each expert gets, side by side for several situations.

    Args:
        loads (Mapping): For each situation, such as ``'clean'`` and ``'under attack'``, the shares (R, N) in [0, 1];
            each row sums to 1, or is NaN where there was nothing to share.
        rows (Sequence[str]): Names of the R rows, each a ``row_kind``.
        columns (str): What the columns are.
        column_names (Sequence[str], optional): Their names. Defaults to their numbers.

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
        figure.suptitle(plain(title), fontsize=10)
        panels = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
        for axes, (name, load) in zip(panels, loads.items()):
            picture = axes.imshow(load, cmap=COLORMAP, vmin=0, vmax=1, aspect='auto', interpolation='nearest')
            axes.set_title(plain(name), fontsize=9)
            axes.set_xlabel(columns)
            if load.shape[1] <= _LABELLED_ROWS:
                shown = [plain(name) for name in column_names or range(load.shape[1])]
                turned = len(''.join(shown)) * len(loads) > _LETTERS
                axes.set_xticks(range(len(shown)), shown, rotation=90 if turned else 0)
            axes.grid(False)
            if load.shape[1] * len(loads) <= _LABELLED_COLUMNS and len(rows) <= _LABELLED_ROWS:
                _label_cells(axes, load)
        if len(rows) <= _LABELLED_ROWS:
            panels[0].set_yticks(range(len(rows)), [plain(name) for name in rows])
        panels[0].set_ylabel(row_kind)
        figure.colorbar(picture, ax=list(panels), label=f'share of {counted}', format='{x:.0%}', shrink=0.9)
    return figure


def draw_confusion(confusion: np.ndarray, groups: Sequence[Sequence[int]], names: Sequence[str], title: str) -> Figure:
    """Draw a heat map of what images of each class are taken for, classes in the order of their groups.

    Args:
        confusion (np.ndarray): Counts (K, K), the true class by row.
        groups (Sequence[Sequence[int]]): The classes of each group, which has a frame.
        names (Sequence[str]): Names of the K classes.

    Raises:
        ValueError: The groups do not hold each class once.
    """
    order = [index for group in groups for index in group]
    if sorted(order) != list(range(len(confusion))):
        raise ValueError(f'groups={groups} do not hold each of {len(confusion)} classes once')
    rates = (confusion / np.maximum(confusion.sum(1, keepdims=True), 1))[np.ix_(order, order)]
    shown = [names[index] for index in order]
    figure = draw_loads({'': rates}, shown, title, counted='the class', columns='taken for', column_names=shown)
    axes = figure.axes[0]
    if len(order) > _LABELLED_ROWS:
        # Numbers would be places, not classes.
        axes.set(xticks=[], yticks=[])
    start = -0.5
    for group in groups:
        box = Rectangle((start, start), len(group), len(group), fill=False, edgecolor=PALETTE[1], linewidth=2)
        axes.add_patch(box)
        start += len(group)
    return figure


def _label_cells(axes: Axes, load: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(load):
        # Written so that NaN, and what would read 0%, is left out.
        if share > 0.005:
            # The upper half of the colour map is light.
            color = 'black' if share > 0.5 else 'white'
            axes.text(column, row, f'{share:.0%}', ha='center', va='center', color=color, fontsize=7)


#: Points of a scalar: iterations and values.
Points = Sequence[tuple[int, float]]

_ACCURACY = re.compile(r'^(?:(?P<attack>[^/]+)/)?accuracy/top1$')
_LOSS = re.compile(r'^(?:(?P<turn>experts|router)/)?(?P<term>loss\w*)$')
_RATE = re.compile(r'^(?:(?P<group>[^/]+)\.)?lr$')
_SHARE = re.compile(r'^router/share_(?P<view>clean|adversarial)_(?P<expert>\d+)$')


def draw_training(scalars: Mapping[str, Points], selected: int | None = None) -> dict[str, Figure]:
    """Draw all charts that the scalars of a run allow.

    Args:
        scalars (Mapping): The points ``(iteration, value)`` of each scalar, under the names that
            :class:`~mmadvmoe.models.RobustClassifier`, :class:`~mmadvmoe.evaluation.RobustValLoop`,
            :class:`~mmadvmoe.training.RouterHealthHook` and MMEngine's logger give them.
        selected (int, optional): Iteration of the checkpoint that was selected, to be marked.

    Returns:
        dict: The figures under their names: in alternating training ``losses_experts``, ``losses_router``,
        ``validation``, ``route_changes``, ``load``, ``entropy``, ``logits`` and ``learning_rates``; in joint training
        ``losses`` in place of the first two. What a run did not log is left out.
    """
    percent = dict(limits=(0, 103))
    entropies = {'of the load': 'router/load_entropy', 'of one decision': 'router/entropy'}
    entropies = _lines({label: scalars.get(name, ()) for label, name in entropies.items()})
    logits = scalars.get('router/max_logit', ())
    sizes = [value for _, value in logits if value > 0]
    log = dict(log=bool(sizes) and max(sizes) > 30 * min(sizes))
    accuracies, rates = _matching(scalars, _ACCURACY, 'attack', 'clean'), _matching(scalars, _RATE, 'group', 'all')
    charts = {
        **_losses(scalars),
        'validation': (accuracies, 'Validation: accuracy, clean and under attack', 'accuracy (%)', percent),
        'route_changes': (_route_changes(scalars), 'Routes changed by the attack', 'images (%)', percent),
        'load': (_loads(scalars), 'Load of the experts in training', 'share (%)', percent),
        'entropy': (entropies, 'Entropy of the router', 'nats', {}),
        'logits': (_lines({'of all images': logits}), 'Largest absolute logit of the router', 'logit', log),
        'learning_rates': (rates, 'Learning rates', 'learning rate', {}),
    }
    mark = None if selected is None else (selected, 'the checkpoint')
    return {
        name: draw_lines(lines, title, 'iteration', ylabel, mark=mark, **options)
        for name, (lines, title, ylabel, options) in charts.items()
        if lines
    }


def _losses(scalars: Mapping[str, Points]) -> dict[str, tuple]:
    """One chart of losses for each turn, with the terms of its objective."""
    charts = {}
    for turn, title in ((None, 'Losses'), ('experts', "Experts' turn: losses"), ('router', "Router's turn: losses")):
        found = [match for name in scalars if (match := _LOSS.match(name)) and match['turn'] == turn]
        terms = {match['term'].removeprefix('loss_').replace('_', ' '): scalars[match[0]] for match in found}
        # A sum of one term says nothing that the term does not.
        if len(terms) == 2:
            terms.pop('loss', None)
        charts[f'losses_{turn}' if turn else 'losses'] = (_lines(terms), title, 'loss', {})
    return charts


def _route_changes(scalars: Mapping[str, Points]) -> list[Line]:
    validation = {
        f'validation, {name.split("/")[0]}': points
        for name, points in scalars.items()
        if name.endswith('/route_changed') and not name.startswith('router/')
    }
    training = {'in training': scalars.get('router/route_changed', ())}
    return _lines(training, scale=100) + _lines(validation, scale=100, first=1)


def _loads(scalars: Mapping[str, Points]) -> list[Line]:
    lines = []
    for found in filter(None, map(_SHARE.match, scalars)):
        view, expert = dict(clean='clean', adversarial='attacked')[found['view']], int(found['expert'])
        points = {f'expert {expert}, {view}': scalars[found[0]]}
        lines += _lines(points, scale=100, first=expert, stroke=int(view == 'attacked'))
    return lines


def _matching(scalars: Mapping[str, Points], pattern: re.Pattern, group: str, otherwise: str) -> list[Line]:
    """The scalars whose name matches, labelled by a group of the match."""
    return _lines({found[group] or otherwise: scalars[name] for name in scalars if (found := pattern.match(name))})


def _lines(points: Mapping[str, Points], scale: float = 1.0, first: int = 0, stroke: int = 0) -> list[Line]:
    return [
        Line(label, [x for x, _ in drawn], [scale * y for _, y in drawn], color=color, stroke=stroke)
        for color, (label, drawn) in enumerate(((label, each) for label, each in points.items() if each), first)
    ]
