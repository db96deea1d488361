"""Every config of the repository trains, at reduced size, on small data in the official formats."""

import copy
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, load_checkpoint
from mmpretrain.registry import MODELS

from mmadvmoe.cost import input_shape_of
from mmadvmoe.moe import split_parameters

ROOT = Path(__file__).parents[2] / 'configs'
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob('*.py') if '_base_' not in path.parts)
NETWORKS = ('resnet18', 'wrn-28-10', 'vgg16-bn', 'densenet-bc-40-12')
DATA_SETS = ('cifar10', 'cifar100', 'tiny-imagenet', 'imagenet')
BASELINES = [f'{method}_{kind}' for method in ('at', 'plain') for kind in ('dense', 'sdense', 'moe')]

#: Widths and depths that keep every kind of layer of a network.
SMALL = dict(
    stem_channels=4,
    base_channels=4,
    widen_factor=1,
    growth_rate=2,
    init_channels=4,
    depths=[1, 1, 1],
    embed_dims=8,
    num_layers=4,
    num_heads=2,
    feedforward_channels=16,
)
#: By the beginnings of types, networks of fewer layers.
SHALLOW = dict(
    ResNet=dict(num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(1,)),
    WideResNet=dict(depth=10),
    ScaledVGG=dict(depth=11),
)
#: Attack steps, and what makes images of 224x224.
FAST = dict(steps=1, scale=32, crop_size=32)
_trained = []


def _replace(cfg, values: dict) -> None:
    """Replace settings by name, wherever they stand below ``cfg``."""
    for key, value in cfg.items() if isinstance(cfg, dict) else enumerate(cfg):
        if key in values:
            cfg[key] = values[key]
        elif isinstance(value, (dict, list)):
            _replace(value, values)


def _dense_backbone(model: dict) -> dict:
    return model.backbone.backbone if model.backbone.type == 'MoEBackbone' else model.backbone


def _size(cfg: Config) -> int:
    """Images of this size tell what the head gets: of those that are pooled anyhow, small ones."""
    inner = _dense_backbone(cfg.model)
    return inner.get('img_size', inner.get('image_size', min(32, input_shape_of(cfg)[-1])))


def _feature_channels(model: dict, size: int) -> int:
    """What the head gets: the features of the dense network of a config."""
    inner = _dense_backbone(model)
    backbone = MODELS.build(copy.deepcopy(inner))
    backbone.eval()
    with torch.no_grad():
        features = backbone(torch.rand(1, inner.get('in_channels', 3), size, size))
        return (MODELS.build(model.neck)(features) if model.get('neck') else features)[-1].shape[1]


def _reduced(path: str, data: Path, work_dir: Path) -> Config:
    cfg = Config.fromfile(ROOT / path)
    init_default_scope(cfg.default_scope)
    _replace(cfg.model.backbone, SMALL)
    inner = _dense_backbone(cfg.model)
    for kind, shallow in SHALLOW.items():
        if inner.type.startswith(kind):
            inner.update(shallow)
    if cfg.model.backbone.get('router', {}).get('type') == 'ResNetRouter':
        cfg.model.backbone.router.update(base_channels=2, num_blocks=1)
    dense_source = inner.pop('init_cfg', None)
    cfg.model.head.in_channels = _feature_channels(cfg.model, _size(cfg))
    if 'target' in cfg.model:
        # Half as wide as this small network, as the pathway is half as wide as the dense one.
        _replace(
            cfg.model.target.backbone,
            {
                key: value // 2
                for key, value in SMALL.items()
                if key.endswith(('base_channels', 'stem_channels', 'rate'))
            },
        )
        narrow = Config(dict(model=cfg.model.to_dict()))
        narrow.merge_from_dict(dict(model=cfg.model.target))
        cfg.model.target.head.in_channels = _feature_channels(narrow.model, _size(cfg))
    if dense_source is not None:
        dense = dict(type='ImageClassifier', backbone=inner, head={**cfg.model.head, 'init_cfg': None})
        torch.save(MODELS.build(copy.deepcopy(dense)).state_dict(), work_dir / 'dense.pth')
        inner.init_cfg = dense_source
        _replace(cfg.model, dict(checkpoint=str(work_dir / 'dense.pth')))
    _replace(cfg.model.get('data_preprocessor', {}), FAST)
    _replace(cfg.val_cfg.attacks, FAST)
    for part, images in (('train', 16), ('val', 8), ('test', 8)):
        loader = cfg[f'{part}_dataloader']
        loader.update(batch_size=4, num_workers=0)
        # Packing the data list collects garbage each time, which takes longer than the training here.
        dataset = loader.dataset.get('dataset', loader.dataset)
        dataset.update(indices=images, serialize_data=False)
        if 'data_root' in dataset:
            dataset.update(data_root=str(data / Path(dataset.data_root).name), num_val=10)
        if dataset.type == 'ImageNetSplit':
            _replace(dataset.pipeline, FAST)
    # Two turns of each group, then a validation and a checkpoint.
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    _replace(cfg.param_scheduler, dict(begin=0))
    _replace(cfg.custom_hooks, dict(router_first_iters=2, begin_epoch=0, k_experts=1))
    cfg.work_dir = str(work_dir)
    cfg.log_level = 'ERROR'
    return cfg


def test_every_network_meets_every_data_set_by_every_method() -> None:
    expected = {f'advmoe_{network}_{data}.py' for network in NETWORKS for data in DATA_SETS}
    expected |= {
        f'baselines/{method}_{network}_{data}.py' for method in BASELINES for network in NETWORKS for data in DATA_SETS
    }
    assert len(expected) == 112
    assert expected <= set(FILES)


@pytest.mark.parametrize('path', FILES)
def test_config_trains_validates_saves_and_loads(path: str, small_data: Path, tmp_path: Path) -> None:
    cfg = _reduced(path, small_data, tmp_path)
    torch.manual_seed(0)
    runner = Runner.from_cfg(cfg)
    before = {name: value.clone() for name, value in runner.model.named_parameters()}
    model = runner.train()
    assert runner.iter == 4
    groups = split_parameters(model)
    assert bool(groups['router']) == (getattr(model.backbone, 'num_routers', 0) > 0)
    for group, parameters in groups.items():
        if parameters:
            assert any(not torch.equal(before[name], value) for name, value in parameters), group
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())

    metrics = {
        key.split('/', 1)[1]: value.data[-1][0]
        for key, value in runner.message_hub.log_scalars.items()
        if key.startswith('val/')
    }
    assert math.isfinite(metrics['clean/accuracy/top1']) and math.isfinite(metrics['worst/accuracy/top1'])
    assert cfg.default_hooks.checkpoint.save_best in metrics
    # What the test will use can be built; the attack itself is not run here.
    assert len(runner.build_test_loop(runner._test_loop).dataloader.dataset) == 8

    saved = MODELS.build(cfg.model)
    load_checkpoint(saved, str(tmp_path / 'epoch_1.pth'), map_location='cpu', strict=True)
    # With a moving average of the weights, that is what a checkpoint holds.
    averages = [hook.ema_model.module for hook in runner.hooks if hasattr(hook, 'ema_model')]
    images = torch.rand(4, *input_shape_of(cfg))
    with torch.no_grad():
        assert torch.equal(saved.eval()(images), [model, *averages][-1].eval()(images))
    _trained.append(path)


def test_a_runner_validates_tests_and_trains_in_any_order(
    small_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Hooks of MMPretrain build the training loop in a validation; what was called decides nevertheless."""
    cfg = _reduced('advmoe_resnet18_digits.py', small_data, tmp_path)
    cfg.log_level, cfg.experiment_name = 'WARNING', f'any_order_{tmp_path.name}'
    cfg.test_cfg = dict(cfg.val_cfg, type='RobustTestLoop')
    runner = Runner.from_cfg(cfg)
    first, tested = runner.val(), runner.test()
    assert (runner.iter, runner.val()) == (0, first)
    runner.train()
    trained = runner.val()
    assert runner.iter == 4 and not {'last_checkpoint', 'epoch_1.pth'} - {file.name for file in tmp_path.iterdir()}
    runner.train()  # is complete
    assert runner.iter == 4 and runner.val() == trained and runner.test().keys() == tested.keys()
    assert 'without ExactResumeHook' not in ''.join(capfd.readouterr())


@pytest.mark.usefixtures('no_drawing_of_weights')
def test_heads_fit_the_networks_at_full_size() -> None:
    channels = {}
    for path in FILES:
        cfg = Config.fromfile(ROOT / path)
        init_default_scope('mmpretrain')
        model, size = cfg.model, _size(cfg)
        key = str((_dense_backbone(model), model.get('neck'), size))
        if key not in channels:
            channels[key] = _feature_channels(model, size)
        assert model.head.in_channels == channels[key], path


def test_no_config_was_left_out(request: pytest.FixtureRequest) -> None:
    # Of all files when the whole module runs; of those selected, when some are.
    items = [item for item in request.session.items if item.name.startswith('test_config_trains')]
    assert sorted(_trained) == sorted(item.callspec.params['path'] for item in items)
    if not request.config.option.keyword and len(request.session.items) > 1:
        assert len(_trained) == len(FILES) == len(list(ROOT.rglob('*.py'))) - len(list((ROOT / '_base_').rglob('*.py')))
