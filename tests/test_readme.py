"""The examples of the README and of a tutorial do what they say, and what the documents name exists."""

import importlib
import json
import re
import runpy
from pathlib import Path

import mmpretrain
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmadvmoe.moe import split_parameters
from mmadvmoe.runtime import check_config

ROOT = Path(__file__).resolve().parents[1]
#: The documents whose Python examples are files.
WITH_FILES = (ROOT / 'README.md', ROOT / 'docs' / 'tutorials' / 'own_parts.md')
DOCUMENTS = (*WITH_FILES, *sorted({*(ROOT / 'docs').rglob('*.md'), ROOT / 'configs' / 'README.md'} - {*WITH_FILES}))
README, TEXT, ALL_TEXT = (
    '\n'.join(path.read_text(encoding='utf-8') for path in paths) for paths in (WITH_FILES[:1], WITH_FILES, DOCUMENTS)
)
#: The Python examples by the file name in their first line.
EXAMPLES = dict(re.findall(r'```(?:python\n#|{code-cell} ipython3\n%%writefile) (\w+\.py)\n(.*?)```', TEXT, re.DOTALL))


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples as files and the configs beside them."""
    folder = tmp_path_factory.mktemp('readme') / 'mmadvmoe'
    folder.mkdir()
    assert len(EXAMPLES) == TEXT.count('```python') + TEXT.count('%%writefile') == 6
    for name, code in EXAMPLES.items():
        (folder / name).write_text(code)
    (folder / 'configs').symlink_to(ROOT / 'configs')
    # The wheel of MMPretrain brings its configs.
    (folder.parent / 'mmpretrain').symlink_to(Path(mmpretrain.__file__).parent / '.mim')
    return folder


@pytest.fixture(autouse=True)
def _in_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def _train(path: str, pipeline: list, val_images: int) -> tuple[Runner, dict[str, Tensor]]:
    """Two epochs of two batches of digits; the runner, and the parameters before."""
    cfg = Config.fromfile(path)
    cfg.work_dir = 'work_dirs/readme'
    cfg.experiment_name = Path(path).stem
    cfg.log_level = 'WARNING'
    cfg.randomness = dict(seed=0)
    cfg.train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
    dataset = dict(type='Digits', split='train', indices=8, pipeline=[*pipeline, dict(type='PackInputs')])
    sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.train_dataloader = dict(batch_size=4, num_workers=0, dataset=dataset, sampler=sampler)
    cfg.default_hooks.checkpoint = dict(type='SafeCheckpointHook', interval=-1)
    for key in ('test_cfg', 'test_dataloader', 'test_evaluator'):
        cfg.pop(key)
    if val_images:
        cfg.val_dataloader.dataset.indices = val_images
    else:
        for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
            cfg.pop(key)
    check_config(cfg)
    runner = Runner.from_cfg(cfg)
    runner.model.init_weights()
    before = {name: parameter.detach().clone() for name, parameter in runner.model.named_parameters()}
    runner.train()
    return runner, before


def _changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The groups of parameters that are no longer what they were."""
    return {
        group
        for group, named in split_parameters(model).items()
        if any(not torch.equal(parameter, before[name]) for name, parameter in named)
    }


def test_a_mixture_in_ones_own_config() -> None:
    runner, before = _train('my_moe_cifar10.py', [dict(type='Resize', scale=32)], val_images=0)
    assert _changed(runner.model, before) == {'experts', 'router'}
    assert len(runner.model.backbone.expert_layers()) == 16
    # The normalisation of the config that it was made of.
    assert runner.model.data_preprocessor.mean.flatten().tolist() == pytest.approx([125.307, 122.961, 113.8575])


def test_an_attack_a_router_and_a_loss_of_ones_own() -> None:
    runner, before = _train('my_digits.py', [], val_images=12)
    assert _changed(runner.model, before) == {'experts', 'router'}
    assert type(runner.model.backbone.router).__name__ == 'BrightnessRouter'
    scalars = runner.message_hub.log_scalars
    assert 'train/experts/loss_pairing' in scalars and 'train/router/loss_local_entropy' in scalars
    assert scalars['val/corners/accuracy/top1'].current() <= 100


def test_use_of_a_trained_model(folder: Path) -> None:
    cfg = Config.fromfile('configs/advmoe_resnet18_digits.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    checkpoint = Path('work_dirs/digits/best_worst_accuracy_top1_epoch_1.pth')
    checkpoint.parent.mkdir(parents=True)
    torch.save(dict(meta={}, state_dict=model.state_dict()), checkpoint)
    names = runpy.run_path(str(folder / 'use_model.py'))
    assert names['probabilities'].shape == (32, 10) and names['experts'].shape == (32, 1)
    # Real images with their labels, so that there is something to change.
    assert names['labels'].unique().numel() == 10 and 0 < names['images'].mean() < 1
    change = (names['adversarial'] - names['images']).abs().max()
    assert change <= 0.2 + 1e-6


@pytest.mark.parametrize(
    'path', sorted(set(re.findall(r'(?<![\w/.])(?:configs|tools|docs)/[\w./-]+\.(?:py|sh|md|svg|png|jsonl)', ALL_TEXT)))
)
def test_files_that_they_name_exist(path: str) -> None:
    assert (ROOT / path).is_file()


def _anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r'^#+ (.*)$', path.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r'```.*?```', '', document.read_text(encoding='utf-8'), flags=re.DOTALL)
    for link in set(re.findall(r'\]\((?!https?:)([^)\s]+)\)', text)):
        path, _, anchor = link.partition('#')
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize(
    ('name', 'titles'),
    [
        ('fashion-mnist', 'study'),
        ('digits-groups', 'study'),
        ('digits-cost', 'study'),
        ('fashion-mnist-single', 'study'),
        ('fashion-mnist-reachable', 'study'),
        ('digits-reachable', 'study'),
        ('cifar10-narrow', 'digits'),
        ('digits-training', 'digits'),
        ('digits', 'digits'),
        ('vit_digits', 'digits'),
    ],
)
def test_the_tables_are_those_of_the_runs(name: str, titles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    compare, sweep = (importlib.import_module(name) for name in ('compare', 'sweep'))
    folder = ROOT / 'docs' / 'results'
    runs = compare.rows_of(sweep.read(folder / f'{name}_table.jsonl'))
    # What comes from several sweeps stands in the order of its file, and not in the README.
    further = name in (
        'cifar10-narrow',
        'digits-cost',
        'digits-reachable',
        'fashion-mnist-single',
        'fashion-mnist-reachable',
        'digits-training',
    )
    if not further:
        lines = (folder / f'{name}_sweep.txt').read_text(encoding='utf-8').splitlines()
        listed = [sweep.split(line)[0] for line in lines]
        assert set(listed) >= set(runs)
        runs = {label: runs[label] for label in listed if label in runs}
    columns = (folder / f'{titles}_columns.txt').read_text(encoding='utf-8').splitlines()[1:]
    training_time = 'cpu' if name == 'digits-training' else None
    header, ruler, *lines = compare.table(runs, compare.columns_of(runs, columns), training_time).splitlines()
    shown = (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8')
    assert '\n'.join([header, ruler, *lines]) in shown
    head, *cells = ([cell.strip() for cell in line.strip('|').split('|')] for line in (header, *lines))
    found = 0
    for line in cells:
        row = dict(zip(head, line))
        short = [row[title].split(' (')[0] for title in ('SA', columns[-1].partition('=')[2])]
        brief = ' | '.join([row['method'], *short, row['multiply-adds with router']])
        found += f'| {brief} |' in README.replace('**', '')
    assert further or name == 'vit_digits' or found >= min(5, len(runs))


def test_the_class_groups_of_cifar10_are_those_that_the_tool_found() -> None:
    found = json.loads((ROOT / 'docs' / 'results' / 'cifar10_class_groups.json').read_text(encoding='utf-8'))
    shown = (ROOT / 'docs' / 'results.md').read_text(encoding='utf-8')
    for partition in found['partitions']:
        router = partition['router']
        numbers = [partition['kept'] * 100, router['sa'], router['ra'], router['flips']]
        kept, *others = (f'{number:.1f}' for number in numbers)
        assert ' | '.join([kept, f'{max(partition["load"]) * 100:.0f}', *others]) in shown
