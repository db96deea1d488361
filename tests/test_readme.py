"""The examples of the README do what they say."""

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
from mmadvmoe.runtime.preflight import check_config

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')
#: The Python examples by the file name in their first line.
EXAMPLES = {code[2:].split('\n')[0]: code for code in re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)}


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples as files and the configs beside them."""
    folder = tmp_path_factory.mktemp('readme') / 'mmadvmoe'
    folder.mkdir()
    assert len(EXAMPLES) == TEXT.count('```python')
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
    checkpoint = Path(re.search(r"'(work_dirs/\S+\.pth)'", EXAMPLES['use_model.py']).group(1))
    checkpoint.parent.mkdir(parents=True)
    torch.save(dict(meta={}, state_dict=model.state_dict()), checkpoint)
    names = runpy.run_path(str(folder / 'use_model.py'))
    assert names['probabilities'].shape == (4, 10) and names['experts'].shape == (4, 1)
    change = (names['adversarial'] - names['images']).abs().max()
    assert change <= 0.2 + 1e-6


@pytest.mark.parametrize(
    'path', sorted(set(re.findall(r'(?<![\w/])(?:configs|tools|docs)/[\w./-]+\.(?:py|sh|md|svg)', TEXT)))
)
def test_files_that_it_names_exist(path: str) -> None:
    assert (ROOT / path).is_file()
