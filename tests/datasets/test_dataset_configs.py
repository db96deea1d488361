from pathlib import Path

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS, HOOKS

BASE = Path(__file__).parents[2] / 'configs' / '_base_'


def test_digits_config_gives_three_disjoint_parts() -> None:
    init_default_scope('mmpretrain')
    cfg = Config.fromfile(BASE / 'datasets' / 'digits.py')
    loaders = {part: Runner.build_dataloader(cfg[f'{part}_dataloader'], seed=0) for part in ('train', 'val', 'test')}
    assert {part: len(loader.dataset) for part, loader in loaders.items()} == dict(train=1257, val=180, test=360)
    sizes = [len(batch['inputs']) for batch in loaders['train']]
    assert set(sizes) == {64}
    assert all(image.shape == (3, 8, 8) for batch in loaders['train'] for image in batch['inputs'])


def test_cifar10_config_selects_on_training_images() -> None:
    cfg = Config.fromfile(BASE / 'datasets' / 'cifar10.py')
    splits = {part: cfg[f'{part}_dataloader'].dataset.split for part in ('train', 'val', 'test')}
    assert splits == dict(train='train', val='val', test='test')
    for part in splits:
        dataset = DATASETS.build(dict(cfg[f'{part}_dataloader'].dataset, lazy_init=True))
        assert dataset.num_val == 5000


def test_runtime_config_names_hooks_that_exist() -> None:
    cfg = Config.fromfile(BASE / 'default_runtime.py')
    init_default_scope(cfg.default_scope)
    for hook in [*cfg.default_hooks.values(), *cfg.custom_hooks]:
        assert HOOKS.get(hook['type']) is not None, hook
    assert cfg.default_hooks.checkpoint.save_best.startswith('worst/')
