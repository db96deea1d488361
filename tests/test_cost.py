"""Costs against layers counted by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from config_files import find_dense_config
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from PIL import Image

import mmadvmoe  # noqa: F401
from mmadvmoe.cost import count_cost, input_shape_of

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
ROUTER = dict(type='ResNetRouter', base_channels=2, num_blocks=1, num_stages=2)

init_default_scope('mmpretrain')


def classifier(backbone, width):
    return dict(
        type='RobustClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=width),
    )


def resnet(stem, base):
    return dict(type='ResNet_CIFAR', depth=18, stem_channels=stem, base_channels=base)


def moe(num_experts=2, **overrides):
    return (
        dict(
            type='MoEBackbone',
            num_experts=num_experts,
            include=[r'layer\d\.\d\.conv\d'],
            router=ROUTER,
            backbone=resnet(8, 4),
        )
        | overrides
    )


def conv_norm(size, channels_in, channels, kernel):
    """Multiply-adds of a convolution with ``size`` x ``size`` outputs, and of the norm after it, 2 an element."""
    return size * size * channels * (kernel * kernel * channels_in + 2)


def resnet18_by_hand(size, stem, base, classes=10):
    flops, channels = conv_norm(size, 3, stem, 3), stem
    for stage in range(4):
        width = base * 2**stage
        if stage:
            size //= 2
        flops += conv_norm(size, channels, width, 3) + 3 * conv_norm(size, width, width, 3)
        if stage or stem != base:
            flops += conv_norm(size, channels, width, 1)
        channels = width
    return flops + channels * size * size + channels * classes  # average pool, linear


def router_by_hand(size):
    """The router above: a stem, two basic blocks of 2 and 4 channels, a linear layer to 2 experts."""
    flops = conv_norm(size, 3, 2, 3) + 2 * conv_norm(size, 2, 2, 3)
    return flops + conv_norm(size // 2, 2, 4, 3) + conv_norm(size // 2, 4, 4, 3) + 4 * 2


def test_dense_cifar_resnet18_is_the_paper_s_056_gflops():
    cost = count_cost(Config.fromfile(CONFIGS / 'baselines/at_dense_resnet18_cifar10.py'))
    assert cost.gflops * 1e9 == pytest.approx(resnet18_by_hand(32, 64, 64), rel=1e-9)
    assert round(cost.gflops, 2) == 0.56
    assert cost.router_gflops == 0 and cost.params_active == cost.params_total


def test_mixture_costs_one_pathway_and_its_router():
    model = MODELS.build(classifier(moe(), 32))
    cost = count_cost(model, (3, 8, 8))
    assert cost.pathway_gflops * 1e9 == pytest.approx(resnet18_by_hand(8, 8, 4), rel=1e-9)
    assert cost.router_gflops * 1e9 == pytest.approx(router_by_hand(8), rel=1e-9)
    pathway = MODELS.build(classifier(resnet(8, 4), 32))
    params = sum(p.numel() for p in pathway.parameters())
    assert cost.params_active - cost.params_router == params
    assert cost.params_router == sum(p.numel() for p in model.backbone.router.parameters())
    assert cost.params_total == sum(p.numel() for p in model.parameters())


def test_cost_of_what_is_run_does_not_grow_with_the_experts():
    two, eight = (count_cost(MODELS.build(classifier(moe(n), 32)), (3, 8, 8)) for n in (2, 8))
    assert eight.pathway_gflops == two.pathway_gflops
    assert eight.params_total > 3 * two.params_total


def test_routers_of_layers_are_counted_apart():
    cost = count_cost(MODELS.build(classifier(moe(routing='layer', router=None), 32)), (3, 8, 8))
    assert cost.pathway_gflops * 1e9 == pytest.approx(resnet18_by_hand(8, 8, 4), rel=1e-9)
    inputs = [8, 4, 4, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 32, 32, 32]  # channels that each layer's router reads
    assert cost.router_gflops * 1e9 == 2 * sum(inputs)


def test_model_is_left_as_it_was():
    model = MODELS.build(classifier(moe(), 32))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_cost(model, (3, 8, 8))
    assert model.training and not model._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_image_smaller_than_the_strides_is_refused():
    cfg = classifier(dict(type='VGG', depth=11, num_classes=10), 512)
    cfg.update(neck=None, head=dict(type='ClsHead'))
    with pytest.raises(ValueError, match='too small for the strides'):
        count_cost(dict(model=cfg), (3, 8, 8))
    with pytest.raises(ValueError, match='input_shape'):
        count_cost(MODELS.build(classifier(resnet(8, 4), 32)))


def test_shape_comes_from_the_training_pipeline():
    assert input_shape_of(Config.fromfile(CONFIGS / 'advmoe_resnet18_digits.py')) == (3, 8, 8)
    assert input_shape_of(_with_pipeline(dict(type='RandomResizedCrop', scale=(40, 40)))) == (3, 40, 40)
    with pytest.raises(ValueError, match='input shape is unknown'):
        input_shape_of(_with_pipeline())
    with pytest.raises(ValueError, match='has a square crop_size.*give it by hand'):
        input_shape_of(_with_pipeline(dict(type='Resize', scale=(40, 30))))
    assert input_shape_of(_with_pipeline(), (40, 30)) == (3, 40, 30)


def test_shape_that_no_transform_tells_is_that_of_the_first_image(tmp_path):
    for name in 'ab':
        (tmp_path / 'train' / name).mkdir(parents=True)
        for number in range(2):
            Image.new('RGB', (6, 5)).save(tmp_path / 'train' / name / f'{number}.png')
    folders = dict(type='ImageFolders', data_root=str(tmp_path), split='trainval', pipeline=[dict(type='PackInputs')])
    assert input_shape_of(dict(train_dataloader=dict(dataset=folders))) == (3, 5, 6)
    held = dict(type='InMemory', dataset=dict(folders, size=(8, 12)))
    assert input_shape_of(dict(train_dataloader=dict(dataset=held))) == (3, 8, 12)


@pytest.mark.parametrize('network', ['resnet18', 'wrn-28-10', 'vgg16-bn', 'densenet-bc-40-12'])
def test_half_width_saves_over_half_on_every_network(network):
    path = CONFIGS / f'advmoe_{network}_cifar10.py'
    cost, dense = count_cost(Config.fromfile(path)), count_cost(Config.fromfile(find_dense_config(path)))
    assert cost.saving(dense) > cost.saving_with_router(dense) > 50
    assert cost.params_active < cost.params_total


@pytest.mark.parametrize(
    'name', ['advmoe_resnet18_digits_layer.py', 'advmoe_resnet18_digits.py', 'baselines/at_sdense_resnet18_digits.py']
)
def test_dense_config_is_found_by_name(name):
    assert find_dense_config(CONFIGS / name) == CONFIGS / 'baselines/at_dense_resnet18_digits.py'


@pytest.mark.parametrize(
    'name',
    [
        'advmoe_vit-small-moe_imagenet.py',
        'advmoe_vit-small-moe_imagenet_upcycled.py',
        'baselines/at_vit-small-moe_imagenet.py',
    ],
)
def test_a_transformer_with_experts_belongs_to_the_dense_one_of_its_active_size(name):
    path = find_dense_config(CONFIGS / name)
    assert path == CONFIGS / 'baselines/at_dense_vit-small_imagenet.py'
    dense, moe = (Config.fromfile(file).model.backbone for file in (path, CONFIGS / name))
    assert moe.router.top_k == 1 and moe.backbone.arch == dense.arch


def test_dense_config_that_does_not_exist_is_not_made_up(tmp_path):
    assert find_dense_config(tmp_path / 'advmoe_resnet18_digits.py') is None


def test_tool_prints_the_costs_and_the_saving():
    tool = [sys.executable, str(ROOT / 'tools/analysis_tools/get_flops.py')]
    config = str(CONFIGS / 'advmoe_resnet18_cifar10.py')
    done = subprocess.run([*tool, config], capture_output=True, text=True, cwd=ROOT, env=_environment())
    assert done.returncode == 0, done.stderr
    # MMCV's warning of an op that nothing here uses.
    assert 'MultiScaleDeformableAttention' not in done.stderr + done.stdout
    printed = {line[:24].strip(): line[24:].split() for line in done.stdout.splitlines() if line.startswith('  ')}
    assert float(printed['cost'][0]) == pytest.approx(0.5567, abs=1e-4)
    saving = [float(line.split()[-2]) for line in done.stdout.splitlines() if line.endswith('%')]
    assert len(saving) == 2 and saving[0] > saving[1] > 50
    by_hand = resnet18_by_hand(32, 64, 32) / 1e9
    assert float(printed['pathway'][0]) == pytest.approx(100 * (1 - by_hand / 0.5567), abs=0.1)


def _with_pipeline(*transforms):
    dataset = dict(type='RepeatDataset', dataset=dict(pipeline=[*transforms, dict(type='PackInputs')]))
    return dict(train_dataloader=dict(dataset=dataset))


def _environment():
    return os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
