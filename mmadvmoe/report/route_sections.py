"""Sections on why a mixture fails: router or experts, where images go, and single images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmadvmoe.diagnosis.dissection_tables import ATTACKS, FAILURES, counts_of, expert_rows, routes_text
from mmadvmoe.moe import PLACEMENTS
from mmadvmoe.visualization import Line, draw_image_grid, draw_lines, draw_loads, draw_parts, draw_patch_routes

from .page import Picture, Section, Table, as_percent, share, slug
from .results import ModelResults

_WRONG = 'wrong without an attack'
#: Images in one figure, narrow enough for a phone.
_ABREAST = 3
#: Images whose patches are shown.
_PATCHED = 2


def dissection(models: Sequence[ModelResults]) -> Section:
    """Who failed: the router or the experts."""
    section = Section(
        'dissection',
        'Router or expert: which one fails?',
        'The whole model is attacked, then its router alone, then its experts alone with the route held. The tables '
        'count the images that are right without an attack: whether the attack changed their route, and whether it '
        'flipped their prediction.',
    )
    known = [model for model in models if model.dissection]
    mixtures = [model for model in known if model.dissection['failures']]
    if mixtures:
        section.items.append(_failures(mixtures))
    # Files of older versions tell no margins.
    measured = [model for model in mixtures if model.dissection.get('flips_by_margin')]
    if measured:
        section.items.append(_flips(measured))
    section.items += [_expert_table(model) for model in mixtures]
    section.items += [_attack_table(model) for model in known]
    return section


def _failures(models: Sequence[ModelResults]) -> Picture:
    parts, several = {}, len({model.dissection['num_images'] for model in models}) > 1
    for model in models:
        found = model.dissection
        counts = {label: found['failures'][key] for key, label in FAILURES.items()}
        name = f'{model.name} ({found["num_images"]:,} images)' if several else model.name
        parts[name] = counts | {_WRONG: found['num_images'] - sum(counts.values())}
    title = 'What became of the test images'
    said = '; '.join(
        f'{name}: ' + ', '.join(f'{label} {count / sum(of_model.values()):.0%}' for label, count in of_model.items())
        for name, of_model in parts.items()
    )
    figure = draw_parts(parts, title, 'test images (%)')
    return Picture('failures', figure, f'{title}, under attack.', f'{title}. {said}.')


def _flips(models: Sequence[ModelResults]) -> Picture:
    lines = []
    for color, model in enumerate(models):
        bins = model.dissection['flips_by_margin']
        changed = [100 * each['changed'] for each in bins]
        lines.append(Line(model.name, [each['margin_mean'] for each in bins], changed, color, stroke=color))
    title = 'Which routes can be moved'
    said = '; '.join(
        f'{line.label}: ' + ', '.join(f'{y:.0f} at {x:.2f}' for x, y in zip(line.x, line.y)) for line in lines
    )
    figure = draw_lines(lines, title, 'margin of the router (1: its mean)', 'routes changed (%)', (0, 103))
    caption = f'{title}: decisions that the attack on the router changed, by the margin by which they were made '
    caption += 'without it; each point is as many decisions.'
    return Picture('flips_by_margin', figure, caption, f'Routes changed, in percent, by margin. {said}.')


def _attack_table(model: ModelResults) -> Table:
    found = model.dissection
    rows = []
    for key, label in ATTACKS.items():
        outcome = found['attacks'].get(key)
        if outcome:
            rows.append((label, as_percent(outcome['ra']), share(outcome['route_changed']), *counts_of(outcome)))
    counted = [f'route {route}, {after}' for route in ('kept', 'changed') for after in ('still right', 'flipped')]
    head = ('attack on', 'RA', 'routes changed', *counted)
    caption = f'{model.name}: {found["num_images"]:,} images, {as_percent(found["sa"])} of them right without an attack'
    return Table('. '.join(filter(None, [caption, routes_text(found)])), head, rows, wide=True)


def _expert_table(model: ModelResults) -> Table:
    rows = [(name, as_percent(sa), as_percent(ra)) for name, sa, ra in expert_rows(model.dissection)]
    caption = f'{model.name}: each expert on all {model.dissection["num_images"]:,} images. The last row is the most '
    caption += 'that a perfect router could reach.'
    return Table(caption, ('', 'SA', 'RA'), rows)


def loads(models: Sequence[ModelResults]) -> Section:
    """Which experts the images go to, clean and under attack."""
    section = Section(
        'load',
        'Load of the experts',
        'The share of the images of each class that each expert gets, without an attack and under attack. With several '
        'routers, the mean over them, and each layer for itself.',
    )
    for model in models:
        found = model.dissection
        if not found or not found['load']:
            continue
        counted = 'tokens' if PLACEMENTS[found['routing']].reads_tokens else 'images'
        rows = {'class': found['class_names']}
        if len(found['routers']) > 1:
            rows['layer'] = found['routers']
        for kind, names in rows.items():
            views = {'clean': found['load']['clean'], 'under attack': found['load']['end_to_end']}
            idle = [np.nan] * found['num_experts']
            shares = {
                label: np.array([idle if row is None else row for row in view[f'per_{kind}']])
                for label, view in views.items()
            }
            means = '; '.join(
                f'{label} ' + ', '.join(f'expert {n} {mean:.0%}' for n, mean in enumerate(np.nanmean(load, axis=0)))
                for label, load in shares.items()
            )
            title = f'{model.name}: load per {kind}'
            figure = draw_loads(shares, names, title, kind, counted)
            caption, alt = f'{title}, as share of the {counted}.', f'{title}. Mean over all: {means}.'
            section.items.append(Picture(f'{slug(model.name)}_load_per_{kind}', figure, caption, alt))
    return section


def images(models: Sequence[ModelResults]) -> Section:
    """Single images before and after an attack."""
    section = Section(
        'images',
        'Adversarial images',
        'Images of the test set before and after an attack, what the model sees in them and the route that they take. '
        'Up to half of them are chosen among those that fool the model.',
    )
    for model in models:
        if model.examples is None:
            continue
        examples, attack = model.examples.examples, model.examples.attack
        pictures = []
        for number, rows in enumerate(torch.arange(len(examples)).split(_ABREAST)):
            part = examples.take(rows)
            figure = draw_image_grid(part, model.model['class_names'], attack)
            caption = f'{model.name} under {attack}: clean, attacked, and the change.'
            fooled = f'{int(part.fooled.sum())} of them fool {model.name}'
            alt = f'{len(part)} images, clean, attacked by {attack} and their difference; {fooled}.'
            pictures.append(Picture(f'{slug(model.name)}_images_{number}', figure, caption, alt))
        section.add_model(model.name, pictures)
    return section


def patches(models: Sequence[ModelResults]) -> Section:
    """Which patch goes where, for routers of tokens."""
    section = Section(
        'patches',
        'Which patch goes where',
        'Each patch of an image is coloured and numbered by the expert that it goes to, layer by layer. Patches that '
        'the attack sent to another expert have a thick frame.',
    )
    for model in models:
        saved = model.examples
        if saved is None or not saved.patches_before:
            continue
        pictures = []
        layers = model.model['routers']
        for row in range(min(_PATCHED, len(saved.examples))):
            before, after = ([layer[row] for layer in view] for view in (saved.patches_before, saved.patches_after))
            views = (saved.examples.images[row], saved.examples.adversarial[row])
            clean, attacked = (view.permute(1, 2, 0).numpy() for view in views)
            figure = draw_patch_routes(clean, attacked, before, after, model.model['num_experts'], layers)
            moved = '; '.join(
                f'{name}: {int((a != b).sum())} of {len(a)} tokens' for name, a, b in zip(layers, before, after)
            )
            caption = f'{model.name}: experts of the patches, clean and under {saved.attack}.'
            alt = f'Experts of the patches of one image. Moved by the attack, {moved}.'
            pictures.append(Picture(f'{slug(model.name)}_patches_{row}', figure, caption, alt))
        section.add_model(model.name, pictures)
    return section
