"""Networks with folded norms compute what they compute without, and only norms that may be folded are."""

import copy

import pytest
import torch
from mmpretrain.registry import MODELS
from torch import nn

from mmadvmoe.moe import MoEConv2d, weights_held
from mmadvmoe.moe.folded_norms import FOLDED

RESNET = dict(type='mmpretrain.ResNet_CIFAR', depth=18, stem_channels=4, base_channels=4)
EXPERTS = dict(type='MoEBackbone', num_experts=3, include=[r'layer\d\.\d\.conv\d'], backbone=RESNET)
#: Networks, and how many of their norms follow a convolution and nothing else.
NETWORKS = {
    'dense': (RESNET, 20),
    # The router has 19.
    'image': (EXPERTS, 39),
    'layer': (dict(EXPERTS, routing='layer'), 20),
    # Norm, activation, convolution: those after a sum or a concatenation are left.
    'wrn': (dict(type='WideResNet_CIFAR', depth=16, widen_factor=1), 6),
    'densenet': (dict(type='DenseNet_CIFAR', arch=dict(growth_rate=4, depths=[2, 2], init_channels=8)), 4),
}


def build(cfg):
    torch.manual_seed(0)
    network = MODELS.build(copy.deepcopy(cfg))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for statistic, low, high in (
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.0),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                ):
                    statistic.uniform_(low, high)
        if isinstance(module, MoEConv2d) and module.router is not None:
            nn.init.normal_(module.router.fc.weight)
    if getattr(network, 'router', None) is not None:
        nn.init.normal_(network.router.fc.weight)
    network.eval()
    return network.requires_grad_(False)


def measure(network, images):
    """The last features, and the gradient of the images."""
    images = images.clone().requires_grad_()
    features = network(images)[-1]
    weights = torch.linspace(-1, 1, features.numel()).view_as(features)
    return features.detach(), torch.autograd.grad((features * weights).sum(), images)[0]


def count(network):
    return sum(module in FOLDED for module in network.modules())


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=['single', 'double'])
@pytest.mark.parametrize('name', NETWORKS)
def test_features_and_gradients_stay(name, dtype):
    cfg, layers = NETWORKS[name]
    network = build(cfg).to(dtype)
    images = torch.rand(6, 3, 16, 16, dtype=dtype)
    expected = measure(network, images)
    with weights_held(network, lambda: network(images[:2])):
        assert count(network) == layers
        for _ in range(2):
            for value, wanted in zip(measure(network, images), expected):
                torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    assert count(network) == 0
    for value, wanted in zip(measure(network, images), expected):
        assert torch.equal(value, wanted)
    assert not any('forward' in module.__dict__ for module in network.modules())


class Branches(nn.Module):
    """Convolutions that look as if their norms could be folded, and all but the last cannot."""

    def __init__(self):
        super().__init__()
        self.used_twice, self.norm1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.given_out, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.called_twice, self.norm3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.changed, self.norm4 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.seen, self.norm5 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.with_batch_statistics, self.norm6 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
        self.learning, self.norm7 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.plain, self.norm8 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.used_twice(x)
        x = self.norm1(y) + y
        given = self.given_out(x)
        x = self.norm2(given)
        x = self.norm3(self.called_twice(self.called_twice(x)))
        x = self.norm4(self.changed(x).relu_())
        x = self.norm5(self.seen(x))
        x = self.norm6(self.with_batch_statistics(x))
        x = self.norm7(self.learning(x))
        return self.norm8(self.plain(x)), given


def test_only_a_convolution_with_one_use_is_folded():
    torch.manual_seed(0)
    network = Branches().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-0.5, 0.5)
    network.learning.requires_grad_(True)
    seen = []
    network.seen.register_forward_hook(lambda *_: seen.append(1))
    images = torch.rand(4, 3, 8, 8)
    expected = network(images)
    with weights_held(network, lambda: network(images)):
        assert [name for name, module in network.named_modules() if module in FOLDED] == ['plain']
        torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-6)


def test_a_norm_that_is_set_to_training_counts_its_batch_again():
    network = build(RESNET)
    images = torch.rand(4, 3, 16, 16)
    other = copy.deepcopy(network)
    other.train()
    other.requires_grad_(False)
    with weights_held(network, lambda: network(images)):
        for module in network.modules():
            module.training = True
        assert torch.equal(network(images)[-1], other(images)[-1])
    assert torch.equal(network.bn1.running_mean, other.bn1.running_mean)


def test_nothing_is_folded_under_autocast_or_without_norms():
    network = build(RESNET)
    images = torch.rand(2, 3, 16, 16)
    with torch.autocast('cpu', torch.bfloat16), weights_held(network, lambda: network(images)):
        assert count(network) == 0
    linear = nn.Linear(3, 2)
    with weights_held(linear, lambda: pytest.fail('there is nothing to look for')):
        assert count(linear) == 0


def test_inside_it_can_be_held_again_and_a_probe_that_fails_leaves_nothing():
    network = build(EXPERTS)
    images = torch.rand(2, 3, 16, 16)
    with weights_held(network, lambda: network(images)):
        with weights_held(network, lambda: network(images)):
            assert count(network) == 39
        assert count(network) == 39
    with pytest.raises(RuntimeError), weights_held(network, lambda: network(images[:, :1])):
        pass
    assert count(network) == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
