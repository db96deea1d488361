"""Sections on how the models were trained, and on all settings and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from mmadvmoe.visualization import draw_training

from .content import Listing, Picture, Section, Table, slug
from .results import ModelResults

#: What the files of the analysis tools say of how they were made; the checkpoint too, for files can be put in place.
_OF_A_TOOL = ('config', 'checkpoint', 'num_images', 'seed', 'seconds', 'threat_model', 'routing', 'num_experts')
_CHARTS = dict(
    losses='the losses',
    losses_experts="the losses in the experts' turn",
    losses_router="the losses in the router's turn",
    validation='accuracy on the validation images, clean and under attack',
    route_changes='the share of the routes that the attack changed',
    load='the share of the images that each expert got',
    entropy='the entropy of the router, of single decisions and of the load',
    logits='the largest absolute logit of the router',
    learning_rates='the learning rate of each group',
)


def training(models: Sequence[ModelResults]) -> Optional[Section]:
    """Charts of the training runs, both turns."""
    section = Section(
        'training',
        'Training',
        'What the runs logged. In training by turns, experts and router each learn in their own turn, with losses and '
        'a learning rate of their own.',
    )
    for model in models:
        pictures = []
        for name, figure in draw_training(model.scalars).items():
            ends = '; '.join(
                f'{line.get_label()} {line.get_ydata()[0]:.3g} to {line.get_ydata()[-1]:.3g}'
                for line in figure.axes[0].get_lines()
            )
            caption = f'{model.name}, training: {_CHARTS[name]}.'
            pictures.append(Picture(f'{slug(model.name)}_{name}', figure, caption, f'{caption} {ends}.'))
        section.add_model(model.name, pictures)
    return section if section.items else None


def settings(models: Sequence[ModelResults], versions: Mapping[str, str]) -> Section:
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
    section.items.append(Table('Versions that made this page', ('', 'version'), list(versions.items())))
    return section


def _rows_of(model: ModelResults) -> list[tuple[str, str]]:
    rows = [(key, str(model.model[key])) for key in ('config', 'checkpoint', 'checkpoint_sha256', 'work_dir')]
    for part, result in (('evaluation', model.run), ('dissection', model.dissection), ('soundness', model.soundness)):
        rows += [(f'{part}: {key}', value) for key, value in _settings(result).items()]
    return rows


def _settings(result: Optional[Mapping[str, Any]]) -> dict[str, str]:
    """Settings of a result as ``{name: text}``, nested ones with their path."""
    if result is None:
        return {}
    if 'settings' in result:
        wanted = {**result['settings'], 'versions': result['versions'], 'machine': result.get('machine', {})}
        # The whole config is shown below the table.
        wanted['model'] = {key: value for key, value in wanted['model'].items() if key != 'config'}
    else:
        wanted = {key: result[key] for key in _OF_A_TOOL}
    return dict(_flat(wanted))


def _flat(tree: Mapping[str, Any], path: str = '') -> list[tuple[str, str]]:
    flat = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and 'type' not in value:
            flat += _flat(value, f'{path}{key}.')
        elif isinstance(value, Mapping):
            flat.append((path + key, ', '.join(f'{name}={content!r}' for name, content in value.items()) or 'none'))
        else:
            flat.append((path + key, str(value)))
    return flat
