"""Sections on how robust the models are: the summary, and robust accuracy against eps and steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from mmadvmoe.visualization import Line, draw_lines

from .content import Picture, Section, Table, percent, share
from .results import ModelResults

_ABSENT = '–'
_TOP1 = '/accuracy/top1'


def summary(models: Sequence[ModelResults]) -> Section:
    """The accuracies, routes and costs of all models in one table, a column for each."""
    section = Section(
        'summary',
        'Summary',
        'Accuracy on the test images, in percent. SA is the accuracy without an attack. An image counts as robust in '
        'the worst case when it is classified rightly without an attack and under every one of them.',
    )
    rows = [('SA (clean)', [_accuracy(model, 'clean') for model in models])]
    names = dict.fromkeys(name for model in models for name in _attacks(model))
    rows += [(_attack_label(name, models), [_accuracy(model, name) for model in models]) for name in names]
    rows += [
        (f'worst of {", ".join(members)} ({group})', [_accuracy(model, group) for model in models])
        for group, members in _groups(models).items()
    ]
    rows.append(('worst case of all', [_accuracy(model, 'worst') for model in models]))
    rows.append(('routes changed, at most', [_routes_changed(model) for model in models]))
    rows.append(('busiest expert, clean', [_busiest(model) for model in models]))
    rows += [(label, [_cost(model, show) for model in models]) for label, show in _COSTS.items()]
    rows.append(('test images', [_images(model) for model in models]))
    shown = [(label, *cells) for label, cells in rows if set(cells) != {_ABSENT}]
    caption = 'Accuracy (%), routes and cost of each model. GFLOPs are 10⁹ multiply-adds per image.'
    section.items.append(Table(caption, ('', *(model.name for model in models)), shown, wide=True))
    return section


def curves(models: Sequence[ModelResults]) -> Optional[Section]:
    """Robust accuracy against the size of the ball and the steps of the attack."""
    section = Section(
        'curves',
        'Robust accuracy against the attack',
        'Robust accuracy must fall to zero as the ball grows, and must not rise with more steps. Where it does '
        'otherwise, the attack is too weak, and the model is less robust than the numbers say. Of a mixture, the '
        'dashed line is what PGD through the gate finds alone.',
    )
    for key, label, log_x in (('eps', 'radius eps of the ball', False), ('steps', 'steps', True)):
        lines = [line for color, model in enumerate(models) for line in _curve_lines(model, key, color)]
        if not lines:
            continue
        title = f'Robust accuracy against {key}'
        said = '; '.join(
            f'{line.label}: ' + ', '.join(f'{y:.0f} at {x:g}' for x, y in zip(line.x, line.y)) for line in lines
        )
        figure = draw_lines(lines, title, label, 'robust accuracy (%)', (0, 103), log_x=log_x)
        threats = dict.fromkeys(_threat(model.soundness) for model in models if model.soundness)
        caption = f'{title}; the other settings are {"; ".join(threats)}.'
        section.items.append(Picture(f'accuracy_against_{key}', figure, caption, f'{title}, in percent. {said}.'))
    return section if section.items else None


def soundness(models: Sequence[ModelResults]) -> Optional[Section]:
    """Whether the attacks behind the numbers can be trusted."""
    section = Section(
        'soundness',
        'Can the attacks be trusted?',
        'Checks for signs of attacks that fail for a wrong reason, such as a masked gradient. A warning comes with the '
        'numbers that speak against the model.',
    )
    for model in models:
        if model.soundness:
            rows = [(check['title'], check['status'], check['message']) for check in model.soundness['checks']]
            warnings = model.soundness['num_warnings']
            said = f'{warnings or "no"} warning{"" if warnings == 1 else "s"}'
            caption = f'{model.name}: {said}; {_scope(model.soundness)}'
            section.items.append(Table(caption, ('check', 'result', 'numbers'), rows, wide=True))
    return section if section.items else None


def _accuracy(model: ModelResults, name: str) -> str:
    value = (model.metrics or {}).get(name + _TOP1)
    return _ABSENT if value is None else f'{value:.1f}'


def _attacks(model: ModelResults) -> Mapping[str, Any]:
    return model.run['settings']['attacks'] if model.run else {}


def _attack_label(name: str, models: Sequence[ModelResults]) -> str:
    """An attack on the images that others left standing is marked, for its number is not its own alone."""
    after_others = any(name in model.run['settings']['survivors_only'] for model in models if model.run)
    return f'{name}, after those above' if after_others else name


def _groups(models: Sequence[ModelResults]) -> dict[str, Sequence[str]]:
    groups: dict[str, Sequence[str]] = {}
    for model in models:
        if model.run:
            groups.update(model.run['settings']['worst_of'])
    return groups


def _routes_changed(model: ModelResults) -> str:
    changed = {
        name.split('/')[0]: value
        for name, value in (model.metrics or {}).items()
        if name.endswith('/route_changed') and not name.startswith('worst/')
    }
    if not changed:
        return _ABSENT
    most = max(changed, key=changed.get)
    return f'{share(changed[most])} ({most})'


def _busiest(model: ModelResults) -> str:
    loads = [value for name, value in (model.metrics or {}).items() if name.startswith('clean/expert_share/')]
    return share(max(loads)) if loads else _ABSENT


def _cost(model: ModelResults, show: Callable[[Mapping], str]) -> str:
    return show(model.model['cost'])


_COSTS: dict[str, Callable[[Mapping], str]] = {
    'parameters': lambda cost: f'{cost["params_total"]:,}',
    'active parameters': lambda cost: f'{cost["params_active"]:,}',
    'pathway GFLOPs': lambda cost: f'{cost["pathway_gflops"]:.3g}',
    'router GFLOPs': lambda cost: f'{cost["router_gflops"]:.3g}' if cost['router_gflops'] else _ABSENT,
}


def _images(model: ModelResults) -> str:
    return f'{model.run["settings"]["data"]["num_images"]:,}' if model.run else _ABSENT


def _curve_lines(model: ModelResults, key: str, color: int) -> list[Line]:
    """Robust accuracy over a setting; of a mixture also what PGD through the gate alone would say."""
    points = model.soundness['curves'].get(key, ()) if model.soundness else ()
    x = [point[key] for point in points]
    lines = [Line(model.name, x, [point['ra'] for point in points], color)]
    if any(point.get('gate', point['ra']) != point['ra'] for point in points):
        lines.append(Line(f'{model.name}, gate alone', x, [point['gate'] for point in points], color, stroke=1))
    return lines if points else []


def _threat(result: Mapping) -> str:
    threat = result['threat_model']
    return f'{threat["norm"]}, eps {threat["eps"]:.4g}, step size {threat["alpha"]:.4g}, {threat["steps"]} steps'


def _scope(result: Mapping) -> str:
    return f'{result["num_images"]:,} images, SA {percent(result["sa"])}, {_threat(result)}'
