"""Which channels can go, and that a network without them computes what the masked network does."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import nn

import mmadvmoe  # noqa: F401
from mmadvmoe.cost import count_cost
from mmadvmoe.pruning import find_channel_groups, fit_channels, remove_channels

init_default_scope('mmpretrain')


class Residual(nn.Module):
    """A stem, a block with an identity shortcut, a depthwise and a grouped path, a concatenation, two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.a = nn.Conv2d(6, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 5, 1)
        self.right = nn.Conv2d(6, 3, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(8, 7, 1)
        self.hidden = nn.Linear(7 * 4, 9)
        self.out = nn.Linear(9, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.b(self.norm(self.a(x)).relu_())
        x = self.grouped(torch.cat([self.left(x), self.right(x)], dim=1))
        x = nn.functional.adaptive_avg_pool2d(self.last(x), 2).flatten(1)
        return self.out(self.hidden(x).relu())


def groups_of(model, size=8):
    return {group.producers: group for group in find_channel_groups(model, (3, size, size))}


def test_groups_follow_sums_norms_and_poolings_and_stop_at_concatenations():
    groups = groups_of(Residual())
    assert set(groups) == {('stem', 'b'), ('a',), ('last',), ('hidden',)}
    assert groups['stem', 'b'].consumers == ('a', 'left', 'right')
    assert groups['a',].norms == ('norm',) and groups['a',].consumers == ('b',)
    assert groups['last',].channels == 7 and groups['last',].consumers == ('hidden',)


def test_layer_that_is_called_twice_is_not_on_offer():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.shared = nn.Conv2d(4, 4, 1)
            self.out = nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.shared(self.shared(self.stem(x))).mean((2, 3)))

    assert groups_of(Twice()) == {}


def test_product_with_a_learned_weight_per_channel_is_not_on_offer():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.shift = nn.Parameter(torch.randn(1, 4, 1, 1))
            self.out = nn.Linear(4, 2)

        def forward(self, x):
            return self.out((self.stem(x) + self.shift).mean((2, 3)))

    assert groups_of(Scaled()) == {}


def test_model_is_left_as_it_was():
    model = Residual().requires_grad_(False).train()
    find_channel_groups(model, (3, 8, 8))
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters()) and model.norm.running_mean.eq(0).all()


def test_removing_channels_is_silencing_them():
    torch.manual_seed(0)
    model = Residual().eval()
    nn.init.uniform_(model.norm.running_mean, -1, 1)
    groups = find_channel_groups(model, (3, 8, 8))
    kept = [torch.randperm(group.channels)[: group.channels // 2].sort().values for group in groups]
    images = torch.rand(3, 3, 8, 8)

    def silence(index, channels):
        mask = torch.zeros(channels).index_fill_(0, index, 1.0)

        def hook(module, inputs):
            x = inputs[0]
            return (x * (mask.view(1, -1, 1, 1) if x.dim() == 4 else mask.repeat_interleave(x.shape[1] // channels)),)

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(silence(index, group.channels))
        for group, index in zip(groups, kept)
        for name in group.consumers
    ]
    expected = model(images)
    for handle in handles:
        handle.remove()
    remove_channels(model, groups, kept)
    torch.testing.assert_close(model(images), expected)
    assert model.stem.weight.shape == (3, 3, 3, 3) and model.b.weight.shape == (3, 2, 3, 3)
    assert model.hidden.in_features == 3 * 4 and model.norm.num_features == 2


NETWORKS = {
    'resnet18': (dict(base_channels=16, stem_channels=16), 128, 'backbone.layer4.1.conv2'),
    'wrn-28-10': (dict(base_channels=4, widen_factor=3), 48, 'backbone.layer3.3.conv2'),
    'vgg16-bn': (dict(base_channels=8), 256, 'backbone.features.16.conv'),
    'densenet-bc-40-12': (dict(arch=dict(growth_rate=4, depths=[6, 6, 6], init_channels=8)), 44, None),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_every_network_of_the_paper_can_be_brought_to_half_its_cost(name):
    small, channels, last = NETWORKS[name]
    cfg = Config.fromfile(f'configs/_base_/models/{name}_cifar.py').model
    cfg.backbone.update(small)
    cfg.head.in_channels = channels
    model = MODELS.build(cfg).eval()
    groups = find_channel_groups(model, (3, 32, 32))
    assert last is None or any(last in group.producers for group in groups)
    target = 0.5 * count_cost(model, (3, 32, 32)).gflops
    counts = fit_channels(model, groups, (3, 32, 32), target)
    remove_channels(model, groups, [torch.arange(count) for count in counts])
    assert 0.95 * target <= count_cost(model, (3, 32, 32)).gflops <= target
    shares = [count / group.channels for count, group in zip(counts, groups)]
    assert max(shares) - min(shares) < 0.3  # whole channels of narrow layers


def test_cost_that_cannot_be_reached_is_refused():
    cfg = Config.fromfile('configs/_base_/models/resnet18_cifar.py').model
    cfg.backbone.update(base_channels=4, stem_channels=4)
    cfg.head.in_channels = 32
    model = MODELS.build(cfg).eval()
    groups = find_channel_groups(model, (3, 8, 8))
    for target in (1e-9, 1.0):
        with pytest.raises(ValueError, match='can be reached'):
            fit_channels(model, groups, (3, 8, 8), target)
