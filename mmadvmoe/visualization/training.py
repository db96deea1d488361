"""Charts of a training run: the losses of both turns, what validation found, and what the routers did."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Optional

from matplotlib.figure import Figure

from .charts import Line, draw_lines

#: Points of a scalar: iterations and values.
Points = Sequence[tuple[int, float]]

_ACCURACY = re.compile(r'^(?:(?P<attack>[^/]+)/)?accuracy/top1$')
_LOSS = re.compile(r'^(?:(?P<turn>experts|router)/)?(?P<term>loss\w*)$')
_RATE = re.compile(r'^(?:(?P<group>[^/]+)\.)?lr$')
_SHARE = re.compile(r'^router/share_(?P<view>clean|adversarial)_(?P<expert>\d+)$')
_X = 'iteration'


def draw_training(scalars: Mapping[str, Points], selected: Optional[int] = None) -> dict[str, Figure]:
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
        name: draw_lines(lines, title, _X, ylabel, mark=mark, **options)
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
