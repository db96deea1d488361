"""Checkpoints in the layouts of the reference code, converted, against plain networks that hold them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from reference_networks import VGG16, DenseNet40, ResNet18, Router, WideResNet28
from torch import nn

import mmadvmoe  # noqa: F401
from mmadvmoe.moe import forward_routed

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools/model_converters/robust_moe_cnn_to_mmadvmoe.py'
BASE = ROOT / 'configs/_base_/models'

_spec = importlib.util.spec_from_file_location('robust_moe_cnn_to_mmadvmoe', TOOL)
converter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(converter)
init_default_scope('mmpretrain')

# name: (network of the reference, its config, what makes it small)
MIXTURES = {
    'resnet18': (lambda: ResNet18(64, 4, experts=2), 'moe_resnet18_cifar', dict(base_channels=4), 32),
    'wrn-28-10': (
        lambda: WideResNet28(2, 3, experts=2),
        'moe_wrn-28-10_cifar',
        dict(base_channels=2, widen_factor=3, activate_transitions=False),
        24,
    ),
    'vgg16-bn': (lambda: VGG16(4, experts=2), 'moe_vgg16-bn_cifar', dict(base_channels=4), 128),
    'resnet18-imagenet': (
        lambda: ResNet18(4, 4, experts=2, imagenet=True),
        'moe_resnet18_imagenet',
        dict(stem_channels=4, base_channels=4),
        32,
    ),
    'wrn-28-10-imagenet': (
        lambda: WideResNet28(2, 3, experts=2, imagenet=True),
        'moe_wrn-28-10_imagenet',
        dict(base_channels=2, widen_factor=3, activate_transitions=False),
        24,
    ),
}
DENSE = {
    'resnet18': (lambda: ResNet18(4, 4), 'resnet18_cifar', dict(stem_channels=4, base_channels=4), 32),
    'wrn-28-10': (lambda: WideResNet28(2, 3), 'wrn-28-10_cifar', dict(base_channels=2, widen_factor=3), 24),
    'vgg16-bn': (lambda: VGG16(4), 'vgg16-bn_cifar', dict(base_channels=4), 128),
    'resnet18-imagenet': (
        lambda: ResNet18(4, 4, imagenet=True),
        'resnet18_imagenet',
        dict(stem_channels=4, base_channels=4),
        32,
    ),
    'densenet-bc-40-12': (
        lambda: DenseNet40(2, 4),
        'densenet-bc-40-12_cifar',
        dict(arch=dict(growth_rate=2, depths=[6, 6, 6], init_channels=4)),
        None,
    ),
}


def reference(build):
    """A network of the reference with weights and statistics that nothing in it leaves neutral."""
    torch.manual_seed(0)
    network = build()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def mixture(name):
    network = reference(MIXTURES[name][0])
    router = reference(lambda: Router(2))
    images = torch.rand(8, 3, 32, 32)
    network.eval(), router.eval()
    with torch.no_grad():
        # Half of the images to each expert, whatever the weights are.
        logits = router(images)
        router.fc.bias[0] -= (logits[:, 0] - logits[:, 1]).median()
    state = dict(state_dict=network.hang(router).state_dict(), router=router.state_dict(), epoch=3, arch='x')
    return network, images, state


def model_cfg(base, small, channels):
    cfg = Config.fromfile(BASE / f'{base}.py').model
    backbone = cfg.backbone.backbone if cfg.backbone.type == 'MoEBackbone' else cfg.backbone
    backbone.merge_from_dict(small) if hasattr(backbone, 'merge_from_dict') else backbone.update(small)
    if cfg.backbone.type == 'MoEBackbone':
        cfg.backbone.gate = 'logit'
        # The reference's router sees images at full size, also those of ImageNet.
        cfg.backbone.router.stem_stride = 1
    if channels is not None:
        cfg.head.in_channels = channels
    cfg.head.num_classes = 10
    return cfg


def moe_model(name):
    return MODELS.build(model_cfg(*MIXTURES[name][1:])).eval()


def input_gradient(logits, images):
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return torch.autograd.grad((logits.softmax(1) * weights).sum(), images)[0]


def assert_same_function(network, model, images):
    images = images.clone().requires_grad_()
    expected = network(images)
    logits, routings = forward_routed(model, model.data_preprocessor.normalize(images))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    gradient, wanted = input_gradient(logits, images), input_gradient(expected, images)
    assert (gradient - wanted).norm() <= 1e-4 * wanted.norm()
    return routings


@pytest.mark.parametrize('name', MIXTURES)
def test_mixture_gives_the_same_logits_routes_and_gradients(name):
    network, images, state = mixture(name)
    model = moe_model(name)
    model.load_state_dict(converter.convert(state, model))
    (routing,) = assert_same_function(network, model, images)
    assert torch.equal(routing.expert, network.router(images).argmax(1))
    assert min(routing.counts) > 0


@pytest.mark.parametrize('name', DENSE)
def test_dense_network_gives_the_same_logits_and_gradients(name):
    build, base, small, channels = DENSE[name]
    network = reference(build).eval()
    cfg = model_cfg(base, small, channels or 0)
    if channels is None:
        cfg.head.in_channels = network.classifier.in_features
    model = MODELS.build(cfg).eval()
    state = {f'module.{name}': value for name, value in network.state_dict().items()}
    model.load_state_dict(converter.convert(dict(state_dict=state), model))
    assert_same_function(network, model, torch.rand(4, 3, 32, 32))


def test_order_of_the_experts_is_kept():
    network, images, state = mixture('resnet18')
    model = moe_model('resnet18')
    model.load_state_dict(converter.convert(state, model))
    layer = model.backbone.network.layer1[0].conv1
    assert torch.equal(layer.expert_parameters(1)['weight'], network.layer1[0].conv1.weight[4:])


def _misfit(state, name='resnet18', model=None):
    with pytest.raises(converter.MisfitError) as error:
        converter.convert(state, model or moe_model(name))
    return str(error.value)


def test_first_tensor_that_does_not_fit_is_named():
    _, _, state = mixture('resnet18')
    tensors = dict(state['state_dict'])
    wide = tensors | {'layer1.0.conv2.weight': torch.zeros(10, 4, 3, 3), 'layer2.0.conv1.weight': torch.zeros(1)}
    assert _misfit(state | dict(state_dict=wide)).startswith('layer1.0.conv2.weight has shape (10, 4, 3, 3)')
    extra = tensors | {'layer5.0.conv1.weight': torch.zeros(1)}
    assert _misfit(state | dict(state_dict=extra)).startswith('layer5.0.conv1.weight has no place')
    fewer = {name: value for name, value in tensors.items() if name != 'layer3.1.bn1.bias'}
    assert _misfit(state | dict(state_dict=fewer)).startswith('backbone.network.layer3.1.bn1.bias')


def test_two_different_routers_are_refused():
    _, _, state = mixture('resnet18')
    tensors = dict(state['state_dict'])
    tensors['layer1.0.conv1.router.fc.bias'] = tensors['layer1.0.conv1.router.fc.bias'] + 1
    assert 'layer1.0.conv1.router.fc.bias is not a copy' in _misfit(state | dict(state_dict=tensors))


def test_mixture_without_a_router_is_refused():
    tensors = reference(MIXTURES['resnet18'][0]).state_dict()
    assert 'backbone.router.conv1.weight' in _misfit(dict(state_dict=tensors))


def test_wide_mixture_needs_blocks_that_convolve_their_raw_input():
    _, _, state = mixture('wrn-28-10')
    _, base, small, channels = MIXTURES['wrn-28-10']
    model = MODELS.build(model_cfg(base, small | dict(activate_transitions=True), channels))
    message = _misfit(state, model=model)
    assert message.startswith('block1.layer.0.bn1.weight') and 'activate_transitions=False' in message


def test_what_no_shape_shows_is_refused():
    _, _, state = mixture('resnet18')
    cfg = model_cfg(*MIXTURES['resnet18'][1:])
    cfg.backbone.router.stem_stride = 2
    assert 'stem_stride=2' in _misfit(state, model=MODELS.build(cfg))
    normalised = dict(state['state_dict']) | {
        'normalize.mean': torch.tensor([0.5, 0.4, 0.3]),
        'normalize.std': torch.tensor([0.2, 0.2, 0.2]),
    }
    assert 'data_preprocessor.mean=[127.5, 102.0, 76.5]' in _misfit(state | dict(state_dict=normalised))
    cfg = model_cfg(*MIXTURES['resnet18'][1:])
    cfg.data_preprocessor.update(mean=[127.5, 102.0, 76.5], std=[51.0] * 3)
    model = MODELS.build(cfg)
    model.load_state_dict(converter.convert(state | dict(state_dict=normalised), model))
    assert 'not normalised' in _misfit(state, model=model)


def test_foreign_networks_are_refused():
    assert _misfit(dict(state_dict={'blocks.0.attn.qkv.weight': torch.zeros(1)})).startswith('blocks.0.attn')
    assert 'no `state_dict`' in _misfit(dict(model={}))


def test_tool_writes_a_checkpoint_that_loads_and_runs_nothing_of_a_malicious_one(tmp_path):
    network, images, state = mixture('resnet18')
    Config(dict(model=model_cfg(*MIXTURES['resnet18'][1:]).to_dict())).dump(tmp_path / 'config.py')
    torch.save(state, tmp_path / 'reference.pth.tar')
    torch.save(dict(state_dict=_Planted()), tmp_path / 'planted.pth.tar')
    script = (
        'import runpy, sys\n'
        'for argv in eval(sys.argv[1]):\n'
        '    sys.argv = argv\n'
        '    try:\n'
        '        runpy.run_path(argv[0], run_name="__main__")\n'
        '    except Exception as error:\n'
        '        print(type(error).__name__)\n'
    )
    config = ['--config', str(tmp_path / 'config.py')]
    runs = [
        [str(TOOL), str(tmp_path / 'reference.pth.tar'), str(tmp_path / 'ours.pth'), *config],
        [str(TOOL), str(tmp_path / 'planted.pth.tar'), str(tmp_path / 'no.pth'), *config],
    ]
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-c', script, repr(runs)], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert 'CheckpointError' in done.stdout and not (tmp_path / 'no.pth').exists(), done.stderr
    assert not (tmp_path / 'planted').exists()
    model = moe_model('resnet18')
    model.load_state_dict(torch.load(tmp_path / 'ours.pth', weights_only=True)['state_dict'])
    assert_same_function(network, model, images)


class _Planted:
    def __reduce__(self):
        return os.mkdir, ('planted',)
