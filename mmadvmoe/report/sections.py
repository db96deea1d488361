"""The sections of a report; those on routes and single images are in ``route_sections``."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmadvmoe.diagnosis.dissection_tables import threat_text
from mmadvmoe.visualization import Line, draw_lines, draw_training

from .outcome_sections import classes, facts, flow
from .page import ABSENT, Listing, Picture, Section, Table, as_count, as_percent, share, slug, write_page
from .results import ModelResults
from .route_sections import dissection, images, loads, patches

_PACKAGES = ('mmadvmoe', 'torch', 'mmengine', 'mmpretrain', 'torchattacks', 'numpy', 'matplotlib')
_TOP1 = '/accuracy/top1'
#: How the file of an analysis tool was made; the checkpoint too, for files can be put in place by hand.
_OF_A_TOOL = ('config', 'checkpoint', 'num_images', 'seed', 'seconds', 'threat_model', 'routing', 'num_experts')
_COSTS = {
    'parameters': lambda cost: f'{cost["params_total"]:,}',
    'active parameters': lambda cost: f'{cost["params_active"]:,}',
    'pathway GFLOPs': lambda cost: f'{cost["pathway_gflops"]:.3g}',
    'router GFLOPs': lambda cost: f'{cost["router_gflops"]:.3g}' if cost['router_gflops'] else ABSENT,
}


def write_report(out_dir: Path, models: Sequence[ModelResults]) -> Path:
    """Write ``report.html`` on the models, in the order of columns and colours, and its figures; return the HTML file.

    Raises:
        ValueError: There is no model.
    """
    if not models:
        raise ValueError('a report needs at least one model')
    return write_page(out_dir, [model.name for model in models], sections_of(models))


def sections_of(models: Sequence[ModelResults]) -> list[Section]:
    """All sections that the results allow."""
    known = [model for model in models if model.model is not None]
    makers = (facts, summary, curves, classes, dissection, flow, loads, images, patches, soundness, training, settings)
    sections = [damaged(models), *(make(known) for make in makers if known)]
    return [section for section in sections if section.items]


def damaged(models: Sequence[ModelResults]) -> Section:
    """The files that could not be read, and what to do about each."""
    section = Section('damaged', 'Damaged files', 'These files could not be read. What they hold is missing below.')
    rows = [(model.name, sentence) for model in models for sentence in model.damaged]
    if rows:
        section.items.append(Table('Damaged files and their cure', ('model', 'file, damage and cure'), rows, wide=True))
    return section


def summary(models: Sequence[ModelResults]) -> Section:
    """The accuracies, routes and costs of all models in one table, a column for each."""
    section = Section(
        'summary',
        'Summary',
        'Accuracy on the test images, in percent, and of how many where these differ. SA is the accuracy without an '
        'attack. An image counts as robust in the worst case when it is classified rightly without an attack and '
        'under every one of them.',
    )
    runs = [model.run['settings'] for model in models if model.run]
    # The number of an attack on the survivors of others is not its own alone.
    after_others = {name for run in runs for name in run['survivors_only']}
    attacks = dict.fromkeys(name for run in runs for name in run['attacks'])
    groups = {name: members for run in runs for name, members in run['worst_of'].items()}
    labels = {'clean': 'SA (clean)'}
    labels |= {name: f'{name}, after those above' if name in after_others else name for name in attacks}
    labels |= {name: f'worst of {", ".join(members)} ({name})' for name, members in groups.items()}
    labels['worst'] = 'worst case of all'
    images_of = [model.run and model.run['settings']['data']['num_images'] for model in models]
    of = [f' of {count:,}' if count is not None and _differ(images_of) else '' for count in images_of]
    rows = [(label, [_accuracy(*each, name) for each in zip(models, of)]) for name, label in labels.items()]
    rows.append(('routes changed, at most', [_routes_changed(model) for model in models]))
    rows.append(('busiest expert, clean', [_busiest(model) for model in models]))
    rows += [(label, [show(model.model['cost']) for model in models]) for label, show in _COSTS.items()]
    rows.append(('test images', [as_count(count) for count in images_of]))
    shown = [(label, *cells) for label, cells in rows if set(cells) != {ABSENT}]
    caption = 'Accuracy (%), routes and cost of each model. GFLOPs are 10⁹ multiply-adds per image.'
    section.items.append(Table(caption, ('', *(model.name for model in models)), shown, wide=True))
    return section


def curves(models: Sequence[ModelResults]) -> Section:
    """Robust accuracy against the size of the ball and the steps of the attack."""
    section = Section(
        'curves',
        'Robust accuracy against the attack',
        'Robust accuracy must fall to zero as the ball grows, and must not rise with more steps. Where it does '
        'otherwise, the attack is too weak, and the model is less robust than the numbers say. Of a mixture, the '
        'dashed line is what PGD through the gate finds alone.',
    )
    for key, label, log_x in (('eps', 'radius eps of the ball', False), ('steps', 'steps', True)):
        found = {model.name: _curves(model) for model in models if key in _curves(model).get('curves', ())}
        several = _differ(each['num_images'] for each in found.values())
        lines = [
            line
            for color, model in enumerate(models)
            if model.name in found
            for line in _curve_lines(model.name, found[model.name], key, color, several)
        ]
        if not lines:
            continue
        title = f'Robust accuracy against {key}'
        said = '; '.join(
            f'{line.label}: ' + ', '.join(f'{y:.0f} at {x:g}' for x, y in zip(line.x, line.y)) for line in lines
        )
        figure = draw_lines(lines, title, label, 'robust accuracy (%)', (0, 103), log_x=log_x)
        threats = dict.fromkeys(threat_text(each, 'images') for each in found.values())
        caption = f'{title}; the other settings are {"; ".join(threats)}.'
        section.items.append(Picture(f'accuracy_against_{key}', figure, caption, f'{title}, in percent. {said}.'))
    return section


def soundness(models: Sequence[ModelResults]) -> Section:
    """Whether the attacks behind the numbers can be trusted."""
    section = Section(
        'soundness',
        'Can the attacks be trusted?',
        'Checks for signs of attacks that fail for a wrong reason, such as a masked gradient. A warning comes with the '
        'numbers that speak against the model.',
    )
    for model in models:
        found = model.soundness
        if found:
            rows = [(check['title'], check['status'], check['message']) for check in found['checks']]
            said = f'{found["num_warnings"] or "no"} warning{"" if found["num_warnings"] == 1 else "s"}'
            scope = f'SA {as_percent(found["sa"])}, {threat_text(found, "images")}'
            caption = f'{model.name}: {said}; {scope}'
            section.items.append(Table(caption, ('check', 'result', 'numbers'), rows, wide=True))
    return section


def _accuracy(model: ModelResults, of: str, name: str) -> str:
    """An accuracy, and ``of`` how many images."""
    value = (model.metrics or {}).get(name + _TOP1)
    return ABSENT if value is None else f'{value:.1f}{of}'


def _differ(counts: Iterable[int | None]) -> bool:
    """Whether several numbers of images stand side by side."""
    return len(set(counts) - {None}) > 1


def _routes_changed(model: ModelResults) -> str:
    changed = {
        name.split('/')[0]: value
        for name, value in (model.metrics or {}).items()
        if name.endswith('/route_changed') and not name.startswith('worst/')
    }
    most = max(changed, key=changed.get, default=None)
    return ABSENT if most is None else f'{share(changed[most])} ({most})'


def _busiest(model: ModelResults) -> str:
    loads = [value for name, value in (model.metrics or {}).items() if name.startswith('clean/expert_share/')]
    return share(max(loads)) if loads else ABSENT


def _curves(model: ModelResults) -> Mapping:
    """Where the curves of a model are: in the checks of the attacks, or else alone."""
    return model.soundness or model.curve or {}


def _curve_lines(name: str, result: Mapping, key: str, color: int, several: bool) -> list[Line]:
    """Robust accuracy over a setting; of a mixture also what PGD through the gate alone would say."""
    points = result['curves'][key]
    x, ra = [point[key] for point in points], [point['ra'] for point in points]
    gate = [point.get('gate', point['ra']) for point in points]
    label = f'{name} ({result["num_images"]:,} images)' if several else name
    lines = [Line(label, x, ra, color)]
    return lines if gate == ra else [*lines, Line(f'{label}, gate alone', x, gate, color, stroke=1)]


def training(models: Sequence[ModelResults]) -> Section:
    """Charts of the training runs, both turns."""
    section = Section(
        'training',
        'Training',
        'What the runs logged. In training by turns, experts and router each learn in their own turn, with losses and '
        'a learning rate of their own.',
    )
    for model in models:
        pictures = []
        for name, figure in draw_training(model.scalars, model.model.get('iteration')).items():
            ends = '; '.join(
                f'{line.get_label()} {line.get_ydata()[0]:.3g} to {line.get_ydata()[-1]:.3g}'
                for line in figure.axes[0].get_lines()
                if line.get_label() != 'the checkpoint'
            )
            # Labels in figures have their $ escaped.
            ends = ends.replace(r'\$', '$')
            caption = f'{model.name}, training: {figure.axes[0].get_title()}.'
            pictures.append(Picture(f'{slug(model.name)}_{name}', figure, caption, f'{caption} {ends}.'))
        section.add_model(model.name, pictures)
    return section


def settings(models: Sequence[ModelResults]) -> Section:
    """Everything that the numbers depend on."""
    section = Section(
        'settings',
        'Settings and versions',
        'What the numbers above depend on. Checkpoints are named by their content as well.',
    )
    rows = {model.name: _rows_of(model) for model in models}
    shared = [row for row in rows[models[0].name] if all(row in of_model for of_model in rows.values())]
    if len(models) > 1:
        section.items.append(Table('All models', ('setting', 'value'), shared, wide=True))
    for model in models:
        own = [row for row in rows[model.name] if len(models) == 1 or row not in shared]
        section.items.append(Table(model.name, ('setting', 'value'), own, wide=True))
        section.items.append(Listing(f'Whole config of {model.name}', model.model['config_text']))
    versions = [(name, importlib.metadata.version(name)) for name in _PACKAGES]
    versions.insert(0, ('python', platform.python_version()))
    section.items.append(Table('Versions that made this page', ('', 'version'), versions))
    return section


def _rows_of(model: ModelResults) -> list[tuple[str, str]]:
    rows = [(key, str(model.model[key])) for key in ('config', 'checkpoint', 'checkpoint_sha256', 'work_dir')]
    if model.run:
        settings = model.run['settings']
        # The whole config is shown below the table.
        shown = {key: value for key, value in settings['model'].items() if key != 'config'}
        others = dict(versions=model.run['versions'], machine=model.run.get('machine', {}))
        rows += _flat({**settings, 'model': shown, **others}, 'evaluation: ')
    for part, found in dict(dissection=model.dissection, soundness=model.soundness).items():
        rows += _flat({key: found[key] for key in _OF_A_TOOL}, f'{part}: ') if found else []
    return rows


def _flat(tree: Mapping[str, Any], path: str) -> list[tuple[str, str]]:
    """Settings as (name, text), nested ones with their path."""
    flat = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and 'type' not in value:
            flat += _flat(value, f'{path}{key}.')
            continue
        if isinstance(value, Mapping):
            value = ', '.join(f'{name}={content!r}' for name, content in value.items()) or 'none'
        flat.append((path + key, str(value)))
    return flat
