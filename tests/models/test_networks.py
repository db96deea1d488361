"""Every network of the paper at full size, dense, narrow and as a mixture: its parameters by hand, and its experts."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import nn

import mmadvmoe  # noqa: F401

init_default_scope('mmpretrain')
BASE = Path(__file__).parents[2] / 'configs' / '_base_' / 'models'


def conv(channels_in, channels, kernel):
    """Parameters of a convolution without bias and the norm after it."""
    return channels_in * channels * kernel**2 + 2 * channels


def resnet(blocks, stem_kernel, bottleneck=False):
    """ResNet, with a first stage of ``width`` after a stem of ``stem`` channels."""

    def count(stem, width):
        total, channels = conv(3, stem, stem_kernel), stem
        for stage, number in enumerate(blocks):
            inner = width * 2**stage
            outer = inner * 4 if bottleneck else inner
            for block in range(number):
                if bottleneck:
                    total += conv(channels, inner, 1) + conv(inner, inner, 3) + conv(inner, outer, 1)
                else:
                    total += conv(channels, inner, 3) + conv(inner, inner, 3)
                if block == 0 and (stage > 0 or channels != outer):
                    total += conv(channels, outer, 1)
                channels = outer
        return total

    return count


def wide_resnet(depth, factor, imagenet=False):
    def count(stem, width):
        # The norm of the 7x7 stem; the 3x3 stem has none.
        total, channels = (conv(3, stem, 7) if imagenet else 27 * stem), stem
        for stage in range(3):
            out = width * factor * 2**stage
            for block in range((depth - 4) // 6):
                # Norms come before the convolutions here.
                total += 2 * channels + channels * out * 9 + 2 * out + out * out * 9
                total += channels * out if block == 0 else 0
                channels = out
        return total + 2 * channels

    return count


def vgg(convs):
    def count(_, width):
        total, channels = 0, 3
        for stage, number in enumerate(convs):
            for _ in range(number):
                total += conv(channels, width * min(2**stage, 8), 3)
                channels = width * min(2**stage, 8)
        return total

    return count


def densenet_bc_40(imagenet=False):
    def count(stem, growth):
        # The 7x7 stem has a norm, the 3x3 stem none.
        total, channels = (conv(3, stem, 7) if imagenet else 27 * stem), stem
        for block in range(3):
            for _ in range(6):
                total += 2 * channels + channels * 4 * growth + 2 * 4 * growth + 4 * growth * growth * 9
                channels += growth
            if block < 2:
                total += 2 * channels + channels * (channels // 2)
                channels //= 2
        return total + 2 * channels

    return count


#: Name: (base config, what differs from it, parameters by stem and width, stem if it keeps its width, width, pattern of
#: the convolutions that all pathways share).
CIFAR_SHARED = r'conv1$|layer\d\.0\.downsample\.0$'
NETWORKS = {
    'resnet18': ('resnet18_cifar', {}, resnet([2, 2, 2, 2], 3), 64, 64, CIFAR_SHARED),
    'resnet34': ('resnet18_cifar', dict(depth=34), resnet([3, 4, 6, 3], 3), 64, 64, CIFAR_SHARED),
    'resnet50': ('resnet18_cifar', dict(depth=50), resnet([3, 4, 6, 3], 3, True), 64, 64, CIFAR_SHARED),
    'resnet101': ('resnet18_cifar', dict(depth=101), resnet([3, 4, 23, 3], 3, True), 64, 64, CIFAR_SHARED),
    'resnet152': ('resnet18_cifar', dict(depth=152), resnet([3, 8, 36, 3], 3, True), 64, 64, CIFAR_SHARED),
    'resnet18-imagenet': ('resnet18_imagenet', {}, resnet([2, 2, 2, 2], 7), None, 64, 'conv1$'),
    'resnet50-imagenet': ('resnet18_imagenet', dict(depth=50), resnet([3, 4, 6, 3], 7, True), None, 64, 'conv1$'),
    'wrn-28-4': ('wrn-28-10_cifar', dict(widen_factor=4), wide_resnet(28, 4), None, 16, 'conv1$'),
    'wrn-28-10': ('wrn-28-10_cifar', {}, wide_resnet(28, 10), None, 16, 'conv1$'),
    'wrn-34-10': ('wrn-28-10_cifar', dict(depth=34), wide_resnet(34, 10), None, 16, 'conv1$'),
    'wrn-28-4-imagenet': ('wrn-28-10_imagenet', dict(widen_factor=4), wide_resnet(28, 4, True), None, 16, 'conv1$'),
    'wrn-28-10-imagenet': ('wrn-28-10_imagenet', {}, wide_resnet(28, 10, True), None, 16, 'conv1$'),
    'wrn-34-10-imagenet': ('wrn-28-10_imagenet', dict(depth=34), wide_resnet(34, 10, True), None, 16, 'conv1$'),
    'vgg11-bn': ('vgg16-bn_cifar', dict(depth=11), vgg([1, 1, 2, 2, 2]), None, 64, r'features\.0\.conv$'),
    'vgg13-bn': ('vgg16-bn_cifar', dict(depth=13), vgg([2, 2, 2, 2, 2]), None, 64, r'features\.0\.conv$'),
    'vgg16-bn': ('vgg16-bn_cifar', {}, vgg([2, 2, 3, 3, 3]), None, 64, r'features\.0\.conv$'),
    'densenet-bc-40-12': ('densenet-bc-40-12_cifar', {}, densenet_bc_40(), 24, 12, r'stem\.0$|transitions\.\d\.conv$'),
    'densenet-bc-40-12-imagenet': (
        'densenet-bc-40-12_imagenet',
        {},
        densenet_bc_40(True),
        24,
        12,
        r'stem\.0$|transitions\.\d\.conv$',
    ),
}
#: Of the whole network, head included: by torchvision, and by table 4 of arXiv:1605.07146.
PUBLISHED = {
    'resnet18-imagenet': (11_689_512, 512 * 1000 + 1000),
    'resnet50-imagenet': (25_557_032, 2048 * 1000 + 1000),
    'wrn-28-10': (36.5e6, 640 * 10 + 10),
}


pytestmark = pytest.mark.usefixtures('no_drawing_of_weights')


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def set_width(backbone, stem, width):
    """Set the widths of a dense backbone; without a stem, that of the stem follows."""
    if 'arch' in backbone:
        backbone.arch.update(growth_rate=width, init_channels=stem)
    else:
        backbone.base_channels = width
    if 'stem_channels' in backbone:
        backbone.stem_channels = stem


@pytest.mark.parametrize('scale', [1, 0.5, 0.25])
@pytest.mark.parametrize('name', NETWORKS)
def test_parameters_of_the_dense_network_at_any_scale(name: str, scale: float) -> None:
    base, changes, count, stem, width, _ = NETWORKS[name]
    backbone = Config.fromfile(BASE / f'{base}.py').model.backbone
    backbone.update(changes)
    stem, width = stem or int(scale * width), int(scale * width)
    set_width(backbone, stem, width)
    assert parameters(MODELS.build(backbone)) == count(stem, width)


@pytest.mark.parametrize('name', NETWORKS)
def test_mixture_of_two_pathways_of_half_the_width(name: str) -> None:
    base, changes, count, stem, width, shared = NETWORKS[name]
    backbone = Config.fromfile(BASE / f'moe_{base}.py').model.backbone
    backbone.backbone.update(changes)
    single = MODELS.build(backbone.backbone)
    assert parameters(single) == count(stem or width // 2, width // 2)
    mixture = MODELS.build(backbone)
    convolutions = {name: module for name, module in single.named_modules() if isinstance(module, nn.Conv2d)}
    expected = {name for name in convolutions if not re.match(shared, name)}
    assert set(mixture.expert_layer_names) == expected
    # What is not shared is there once more; all experts share their norms.
    more = sum(parameters(convolutions[name]) for name in expected)
    assert parameters(mixture.network) == parameters(single) + more


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    _, _, count, stem, width, _ = NETWORKS[name]
    published, head = PUBLISHED[name]
    assert count(stem or width, width) + head == pytest.approx(published, rel=0 if isinstance(published, int) else 2e-3)


def test_the_head_of_vgg_is_that_of_the_reference() -> None:
    for base, width in (('vgg16-bn_cifar', 64), ('moe_vgg16-bn_cifar', 32)):
        model = MODELS.build(Config.fromfile(BASE / f'{base}.py').model.head)
        sizes = [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]
        assert sizes == [(8 * width * 2 * 2, 256), (256, 256), (256, 10)]
        assert [type(layer) for layer in model.modules() if isinstance(layer, nn.ReLU)] == [nn.ReLU] * 2


def test_the_readme_tells_the_heads_of_other_depths() -> None:
    text = (BASE.parents[1] / 'README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| [^|]+ \| `advmoe_(\S+)_\*` \| `(\w+)=(\d+)`(.*?) \| (\d+) \|$', text, re.MULTILINE)
    assert len(rows) == 5
    for network, key, first, others, channels in rows:
        for value in (first, *re.findall(r'`(\d+)`', others)):
            model = Config.fromfile(BASE / f'moe_{network}_cifar.py').model
            backbone = MODELS.build(dict(model.backbone.backbone, **{key: int(value)}))
            backbone.eval()
            with torch.no_grad():
                features = MODELS.build(model.neck)(backbone(torch.zeros(1, 3, 32, 32)))
            assert features[-1].shape[1] == int(channels), (network, value)
