"""The networks of the paper, in small: shapes, frozen stages, weights, and mixtures against their pathways."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import nn

import mmadvmoe  # noqa: F401
from mmadvmoe.models import AdaptiveAveragePooling, DenseNet_CIFAR, ScaledVGG, WideResNet, WideResNet_CIFAR
from mmadvmoe.models.backbones import check_widths
from mmadvmoe.moe import ExpertLayer

init_default_scope('mmpretrain')

BC = dict(growth_rate=2, depths=[2, 1, 1], init_channels=4)
SMALL = dict(
    wrn_cifar=(WideResNet_CIFAR, dict(depth=10, widen_factor=2, base_channels=2), 3, [4, 8, 16], [16, 8, 4]),
    wrn_imagenet=(WideResNet, dict(depth=10, widen_factor=2, base_channels=2), 3, [4, 8, 16], [4, 2, 1]),
    densenet=(DenseNet_CIFAR, dict(arch=BC), 3, [4, 3, 5], [8, 4, 4]),
    vgg=(ScaledVGG, dict(depth=11, base_channels=2), 5, [2, 4, 8, 16, 16], [8, 4, 2, 1, 0]),
)
INCLUDE = dict(
    ResNet_CIFAR=[r'layer\d\.\d+\.conv\d'],
    ResNet=[r'layer\d\.\d+\.conv\d', r'downsample\.0'],
    WideResNet_CIFAR=[r'layer\d\.\d+\.(conv\d|shortcut)'],
    WideResNet=[r'layer\d\.\d+\.(conv\d|shortcut)'],
    ScaledVGG=[r'features\.[1-9]\d*\.conv'],
    DenseNet_CIFAR=[r'stages\.\d\.block\.\d+\.conv\d'],
    DenseNet=[r'stages\.\d\.block\.\d+\.conv\d'],
)
#: Every network that the project names, in small, with how many of its layers hold experts.
NETWORKS = [
    *((dict(type='ResNet_CIFAR', depth=d, stem_channels=4, base_channels=2), n) for d, n in ((18, 16), (34, 32))),
    *(
        (dict(type='ResNet_CIFAR', depth=d, stem_channels=4, base_channels=1), n)
        for d, n in ((50, 48), (101, 99), (152, 150))
    ),
    (dict(type='ResNet', depth=18, stem_channels=2, base_channels=2), 16 + 3),
    (dict(type='ResNet', depth=50, stem_channels=1, base_channels=1), 48 + 4),
    *(
        (dict(type=kind, depth=d, widen_factor=k, base_channels=1), 6 * (d - 4) // 6 + 3)
        for kind in ('WideResNet_CIFAR', 'WideResNet')
        for d, k in ((28, 4), (28, 10), (34, 10))
    ),
    *((dict(type='ScaledVGG', depth=d, base_channels=2, with_last_pool=False), d - 4) for d in (11, 13, 16)),
    *(
        (dict(type=kind, arch=dict(growth_rate=2, depths=[6, 6, 6], init_channels=4)), 36)
        for kind in ('DenseNet_CIFAR', 'DenseNet')
    ),
]


def test_vgg16_bn_ends_in_2x2_positions() -> None:
    network = ScaledVGG(16, base_channels=2, with_last_pool=False)
    assert network(torch.rand(2, 3, 32, 32))[0].shape == (2, 16, 2, 2)


@pytest.mark.parametrize('name', SMALL)
def test_out_indices_give_the_stages_asked_for(name: str) -> None:
    kind, cfg, stages, channels, sides = SMALL[name]
    size = 32 if name == 'vgg' else 16
    sides = [16, 8, 4, 2, 1] if name == 'vgg' else sides
    network = kind(**cfg, out_indices=tuple(range(stages)))
    outs = network(torch.rand(2, 3, size, size))
    assert [out.shape[1] for out in outs] == channels
    assert [out.shape[2] for out in outs] == sides
    last = kind(**cfg, out_indices=(stages - 1,))
    last.load_state_dict(network.state_dict())
    network.eval(), last.eval()
    image = torch.rand(2, 3, size, size)
    assert torch.equal(last(image)[0], network(image)[-1])


@pytest.mark.parametrize('mixture', [False, True], ids=['dense', 'mixture'])
@pytest.mark.parametrize('name', SMALL)
def test_frozen_stages_and_norm_eval_hold_in_training(name: str, mixture: bool) -> None:
    kind, cfg, *_ = SMALL[name]
    backbone = dict(type=kind.__name__, **cfg, frozen_stages=1, norm_eval=True)
    if mixture:
        backbone = dict(type='MoEBackbone', num_experts=2, include=INCLUDE[kind.__name__], backbone=backbone)
    network = MODELS.build(backbone)
    network.train()
    size = 32 if name == 'vgg' else 16
    before = {key: value.clone() for key, value in network.state_dict().items() if not key.startswith('router.')}
    network(torch.rand(2, 3, size, size))[-1].sum().backward()
    after = network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    moved = {key for key, parameter in network.named_parameters() if parameter.grad is not None}
    fixed = {key for key, parameter in network.named_parameters() if not parameter.requires_grad}
    assert moved and fixed and moved | fixed == {key for key, _ in network.named_parameters()}
    stem = next(iter(dict(network.named_parameters())))
    assert stem in fixed and not any(key.startswith('router.') for key in fixed)


@pytest.mark.parametrize('name', SMALL)
def test_init_is_he_for_convolutions(name: str) -> None:
    kind, cfg, *_ = SMALL[name]
    network = kind(**cfg)
    conv = [m for m in network.modules() if isinstance(m, nn.Conv2d)][-1]
    nn.init.zeros_(conv.weight)
    network.init_weights()
    expected = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
    assert float(conv.weight.detach().std()) == pytest.approx(expected, rel=0.4)


def test_transitions_of_a_wide_resnet_are_activated_or_raw() -> None:
    """Against the block written down once more, with weights copied over."""
    for activated in (True, False):
        block = WideResNet_CIFAR(depth=10, widen_factor=2, base_channels=2, activate_transitions=activated).layer2[0]
        x = torch.randn(2, 4, 6, 6)
        block.eval()
        start = block.norm1(x).clamp(min=0) if activated else x
        inner = block.norm2(block.conv1(start)).clamp(min=0)
        assert torch.allclose(block(x), block.conv2(inner) + block.shortcut(start), atol=1e-6)
    assert not list(block.norm1.parameters())  # no parameter that never gets a gradient


@pytest.mark.parametrize(('dense', 'num_layers'), NETWORKS, ids=lambda v: str(v)[9:40] if isinstance(v, dict) else '')
def test_every_network_is_a_mixture_by_its_config(dense: dict, num_layers: int) -> None:
    include = INCLUDE[dense['type']]
    router = dict(type='ResNetRouter', base_channels=2, num_blocks=1, num_stages=2)
    mixture = MODELS.build(
        dict(type='MoEBackbone', num_experts=3, include=include, router=router, backbone=dict(dense))
    )
    layers = [module for module in mixture.modules() if isinstance(module, ExpertLayer)]
    assert len(layers) == num_layers
    single = MODELS.build(dict(dense))
    single.eval(), mixture.eval()
    keys = set(single.state_dict())
    images = torch.rand(2, 3, 32, 32)
    for expert in range(3):
        state = {key: value for key, value in mixture.network.state_dict().items() if key in keys}
        for name in mixture.expert_layer_names:
            for key, value in mixture.network.get_submodule(name).expert_parameters(expert).items():
                state[f'{name}.{key}'] = value
        single.load_state_dict(state)
        with torch.no_grad():
            got = mixture.forward_routed(images, torch.full((2,), expert))[0][-1]
            assert torch.allclose(got, single(images)[-1], atol=1e-5)


def test_adaptive_pooling_keeps_the_order_of_positions() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert AdaptiveAveragePooling(2)((x,))[0].tolist() == [[2.5, 4.5, 10.5, 12.5]]


def test_widths_must_be_whole_numbers_of_channels() -> None:
    with pytest.raises(ValueError, match=r'base_channels=4\.8 .*stem \(conv1\).*nearest is 5'):
        WideResNet_CIFAR(depth=28, widen_factor=10, base_channels=16 * 0.3)
    with pytest.raises(ValueError, match=r'base_channels=0 .*features\.0.*nearest is 1'):
        ScaledVGG(16, base_channels=0)
    with pytest.raises(ValueError, match=r'growth_rate=0\.6 .*dense layer.*nearest is 1'):
        DenseNet_CIFAR(dict(growth_rate=0.6, depths=[6, 6, 6], init_channels=24))
    inner = dict(type='ResNet_CIFAR', depth=18, base_channels=64 * 0.3)
    with pytest.raises(ValueError, match=r'model\.backbone\.backbone\.base_channels=19\.2 .*first stage.*19'):
        check_widths(dict(backbone=dict(type='MoEBackbone', backbone=inner)))


def test_depth_stage_and_image_size_errors_name_the_key() -> None:
    with pytest.raises(ValueError, match='backbone.depth=27 .*28'):
        WideResNet(depth=27, widen_factor=1)
    with pytest.raises(ValueError, match=r'backbone.out_indices=\(3,\)'):
        WideResNet(depth=10, widen_factor=1, out_indices=(3,))
    with pytest.raises(ValueError, match='8x8 are too small .* 16x16'):
        ScaledVGG(11, base_channels=2, with_last_pool=False)(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match='2x2 are too small .* 4x4'):
        DenseNet_CIFAR(BC)(torch.rand(1, 3, 2, 2))
