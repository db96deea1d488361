"""Sections on what was measured, and what each class and each route became of under attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from mmadvmoe.attacks import attack_norm
from mmadvmoe.diagnosis.class_groups import count_pairs
from mmadvmoe.evaluation import CLEAN
from mmadvmoe.visualization import draw_loads

from .page import ABSENT, Picture, Section, Table, as_count, share, slug
from .results import ModelResults

# A table of more classes than these tells less than its ends: the least robust ones are shown.
_MOST_CLASSES = 20
# Pairs of a clean and an attacked expert that a picture has room for.
_MOST_PAIRS = 16


def _norm(cfg: Mapping) -> str:
    try:
        return attack_norm(cfg)
    except ValueError:  # an attack of the user, which is not known here
        return cfg.get('norm', 'Linf')


def facts(models: Sequence[ModelResults]) -> Section:
    """Threat model, data and checkpoint: what every number below is about."""
    section = Section(
        'facts',
        'What was measured',
        'Numbers of different threat models, images or numbers of images cannot be compared.',
    )
    rows = {}
    for model in models:
        settings = model.run['settings'] if model.run else {}
        data, attacks = settings.get('data', {}), settings.get('attacks', {})
        balls = (f'{_norm(cfg)}, eps {cfg["eps"]:.4g}' for cfg in attacks.values() if 'eps' in cfg)
        steps = (f'{name} ({cfg["steps"]} steps)' if 'steps' in cfg else name for name, cfg in attacks.items())
        rows[model.name] = {
            'threat model': '; '.join(dict.fromkeys(balls)) or ABSENT,
            'attacks': ', '.join(steps) or ABSENT,
            'data': str(data.get('type', ABSENT)),
            'images of the evaluation': as_count(data.get('num_images')),
            'images of the dissection': as_count(model.dissection and model.dissection['num_images']),
            'images of the checks of attacks': as_count(model.soundness and model.soundness['num_images']),
            'images of the curve': as_count(model.curve and model.curve['num_images']),
            'checkpoint': model.model['checkpoint'],
            'selected at iteration': as_count(model.model.get('iteration')),
        }
    labels = next(iter(rows.values()))
    shown = [(label, *(of_model[label] for of_model in rows.values())) for label in labels]
    shown = [row for row in shown if set(row[1:]) != {ABSENT}]
    section.items.append(Table('What was measured', ('', *rows), shown, wide=True))
    return section


def classes(models: Sequence[ModelResults]) -> Section:
    """Each class, without an attack and in the worst case, and what it is taken for."""
    section = Section(
        'classes',
        'Which classes fall, and for what they are taken',
        'Accuracy of each class on the images of the evaluation, without an attack and in the worst case of all '
        'attacks, the least robust class first. Each row of the pictures is a true class, each column what the model '
        'sees, as a share of the row.',
    )
    for model in models:
        if model.outcomes is None:
            continue
        section.add_model(model.name, [_class_table(model), _confusion(model)])
    return section


def flow(models: Sequence[ModelResults]) -> Section:
    """From the expert of the clean image to that of the attacked one."""
    section = Section(
        'flow',
        'Where attacks send the images',
        'Each row is the expert that an image takes without an attack, each column the one that it takes in the worst '
        'case, as a share of the row: what is off the diagonal has changed its route. By class, each column is a pair '
        'of the two.',
    )
    for model in models:
        outcomes = model.outcomes
        # With routes by layer or token there is not one expert of an image.
        if outcomes is None or outcomes.by_name[CLEAN].expert.shape[1] != 1:
            continue
        number = model.model['num_experts']
        clean, worst = outcomes.by_name[CLEAN].expert[:, 0], outcomes.worst().expert[:, 0]
        counts = count_pairs(clean, worst, (number, number))
        title = f'{model.name}: route in the worst case'
        figure = draw_loads(
            {'worst case': _shares(counts)}, [str(n) for n in range(number)], title, 'expert, clean', columns='expert'
        )
        said = ', '.join(
            f'{int(counts[a, b])} from {a} to {b}' for a in range(number) for b in range(number) if counts[a, b]
        )
        alt = f'{title}. Images: {said}.'
        section.items.append(Picture(f'{slug(model.name)}_flow', figure, f'{title}, by the clean one.', alt))
        if number**2 <= _MOST_PAIRS:
            section.items.append(_flow_by_class(model, clean * number + worst))
    return section


def _flow_by_class(model: ModelResults, pair: Tensor) -> Picture:
    number, names = model.model['num_experts'], model.model['class_names']
    pairs = [f'{before}→{after}' for before in range(number) for after in range(number)]
    counts = count_pairs(model.outcomes.label, pair, (len(names), len(pairs)))
    title = f'{model.name}: clean route → route in the worst case'
    figure = draw_loads({'': _shares(counts)}, names, title, columns='experts', column_names=pairs)
    changed = [column for column in range(len(pairs)) if column // number != column % number]
    moved = counts[:, changed].sum(axis=1)
    said = '; '.join(f'{names[row]} {int(moved[row])}' for row in np.argsort(-moved)[:3] if moved[row])
    alt = f'{title}, by class. Most images that changed their route: {said or "none"}.'
    return Picture(f'{slug(model.name)}_flow_by_class', figure, f'{title}, as share of the class.', alt)


def _class_table(model: ModelResults) -> Table:
    outcomes, clean = model.outcomes, model.outcomes.by_name[CLEAN]
    columns = {'SA': clean.prediction == outcomes.label, 'worst case': outcomes.robust}
    if clean.expert.shape[1]:
        columns['routes changed'] = (outcomes.worst().expert != clean.expert).any(dim=1)
    rows = []
    for label, name in enumerate(model.model['class_names']):
        of_class = outcomes.label == label
        if of_class.any():
            shares = [float(column[of_class].double().mean()) for column in columns.values()]
            rows.append((shares[1], (str(name), f'{int(of_class.sum()):,}', *map(share, shares))))
    rows = [row for _, row in sorted(rows, key=lambda row: row[0])]
    left_out = f'; the {_MOST_CLASSES} least robust of {len(rows)}' if len(rows) > _MOST_CLASSES else ''
    return Table(f'{model.name}, by class{left_out}', ('class', 'images', *columns), rows[:_MOST_CLASSES])


def _confusion(model: ModelResults) -> Picture:
    outcomes, names = model.outcomes, model.model['class_names']
    views = {'clean': outcomes.by_name[CLEAN].prediction, 'worst case': outcomes.worst().prediction}
    size = (len(names), len(names))
    counts = {view: count_pairs(outcomes.label, prediction, size) for view, prediction in views.items()}
    title = f'{model.name}: true class and what is seen'
    shares = {view: _shares(each) for view, each in counts.items()}
    figure = draw_loads(shares, names, title, 'true class', columns='seen', column_names=names)
    wrong = counts['worst case'] * (1 - np.eye(len(names)))
    most = np.dstack(np.unravel_index(np.argsort(-wrong, axis=None), wrong.shape))[0][:3]
    said = '; '.join(f'{names[a]} seen as {names[b]} {int(wrong[a, b])} times' for a, b in most if wrong[a, b])
    alt = f'{title}. Most frequent in the worst case: {said or "nothing wrong"}.'
    return Picture(f'{slug(model.name)}_confusion', figure, f'{title}, as share of the class.', alt)


def _shares(counts: np.ndarray) -> np.ndarray:
    """Each row divided by its sum; NaN where there is nothing."""
    total = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
