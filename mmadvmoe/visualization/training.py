"""Charts of a training run: the losses of both turns, what validation found, and what the routers did."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from .charts import Line, draw_lines

#: Points of a scalar: iterations and values.
Points = Sequence[tuple[int, float]]

_ACCURACY = re.compile(r'^(?:(?P<attack>[^/]+)/)?accuracy/top1$')
_LOSS = re.compile(r'^(?:(?P<turn>experts|router)/)?(?P<term>loss\w*)$')
_RATE = re.compile(r'^(?:(?P<group>[^/]+)\.)?lr$')
_SHARE = re.compile(r'^router/share_(?P<view>clean|adversarial)_(?P<expert>\d+)$')
_X = 'iteration'


def draw_training(scalars: Mapping[str, Points]) -> dict[str, Figure]:
    """Draw all charts that the scalars of a run allow.

    Args:
        scalars (Mapping): The points ``(iteration, value)`` of each scalar, under the names that
            :class:`~mmadvmoe.models.RobustClassifier`, :class:`~mmadvmoe.evaluation.RobustValLoop`,
            :class:`~mmadvmoe.training.RouterHealthHook` and MMEngine's logger give them.

    Returns:
        dict: The figures under their names: in alternating training ``losses_experts``, ``losses_router``,
        ``validation``, ``route_changes``, ``load``, ``entropy``, ``logits`` and ``learning_rates``; in joint training
        ``losses`` in place of the first two. What a run did not log is left out.
    """
    percent = dict(limits=(0, 103))
    accuracies = _matching(scalars, _ACCURACY, lambda found: found['attack'] or 'clean')
    entropies = _lines(_known(scalars, {'router/load_entropy': 'of the load', 'router/entropy': 'of one decision'}))
    logits = _lines(_known(scalars, {'router/max_logit': 'of all images'}))
    log_logits = dict(log=_spans_decades(scalars.get('router/max_logit', ())))
    rates = _matching(scalars, _RATE, lambda found: found['group'] or 'all')
    charts = {
        **_losses(scalars),
        'validation': (accuracies, 'Validation: accuracy, clean and under attack', 'accuracy (%)', percent),
        'route_changes': (_route_changes(scalars), 'Routes changed by the attack', 'images (%)', percent),
        'load': (_loads(scalars), 'Load of the experts in training', 'share (%)', percent),
        'entropy': (entropies, 'Entropy of the router', 'nats', {}),
        'logits': (logits, 'Largest absolute logit of the router', 'logit', log_logits),
        'learning_rates': (rates, 'Learning rates', 'learning rate', {}),
    }
    return {
        name: draw_lines(lines, title, _X, ylabel, **options)
        for name, (lines, title, ylabel, options) in charts.items()
        if lines
    }


def _losses(scalars: Mapping[str, Points]) -> dict[str, tuple]:
    """One chart of losses for each turn, with the terms of its objective."""
    titles = dict(experts="Experts' turn: losses", router="Router's turn: losses")
    terms: dict[str, dict[str, Points]] = {}
    for name, points in scalars.items():
        found = _LOSS.match(name)
        if found:
            terms.setdefault(found['turn'] or '', {})[found['term'].removeprefix('loss_').replace('_', ' ')] = points
    charts = {}
    for turn, of_turn in terms.items():
        name = f'losses_{turn}' if turn else 'losses'
        # A sum of one term says nothing that the term does not.
        if len(of_turn) == 2:
            of_turn.pop('loss', None)
        charts[name] = (_lines(of_turn), titles.get(turn, 'Losses'), 'loss', {})
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
    for name, points in scalars.items():
        found = _SHARE.match(name)
        if found:
            adversarial = found['view'] == 'adversarial'
            label = f'expert {found["expert"]}, {"attacked" if adversarial else "clean"}'
            lines += _lines({label: points}, scale=100, first=int(found['expert']), stroke=int(adversarial))
    return lines


def _spans_decades(points: Points) -> bool:
    values = [value for _, value in points if value > 0]
    return bool(values) and max(values) > 30 * min(values)


def _matching(scalars: Mapping[str, Points], pattern: re.Pattern, label) -> list[Line]:
    return _lines({label(found): scalars[name] for name in scalars if (found := pattern.match(name))})


def _known(scalars: Mapping[str, Points], labels: Mapping[str, str]) -> dict[str, Points]:
    return {label: scalars[name] for name, label in labels.items() if name in scalars}


def _lines(points: Mapping[str, Points], scale: float = 1.0, first: int = 0, stroke: int = 0) -> list[Line]:
    drawn: Iterable = ((label, of_label) for label, of_label in points.items() if len(of_label))
    return [
        Line(label, [x for x, _ in of_label], [scale * y for _, y in of_label], color=first + i, stroke=stroke)
        for i, (label, of_label) in enumerate(drawn)
    ]
