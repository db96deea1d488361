"""Plain-PyTorch networks in the layouts of the AdvMoE reference code: same tensor names, shapes and functions.

Independent of mmadvmoe: an expert layer computes all experts and masks, and lets the gradient of the mask through.
"""

import torch
import torch.nn.functional as F
from torch import nn


class _OneHot(torch.autograd.Function):
    """One-hot of the largest logit; the gradient goes through as if it were the identity."""

    @staticmethod
    def forward(ctx, logits):
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


class ExpertConv(nn.Conv2d):
    """``experts`` blocks of ``channels`` output channels, one block for each expert."""

    def __init__(self, channels_in, channels, kernel, stride=1, padding=0, experts=1):
        super().__init__(channels_in, channels * experts, kernel, stride, padding, bias=False)
        self.experts = experts
        self.logits = None

    def forward(self, x):
        out = super().forward(x)
        if self.experts == 1:
            return out
        mask = _OneHot.apply(self.logits).repeat_interleave(out.shape[1] // self.experts, dim=1)
        masked = (out * mask[..., None, None]).flatten(0, 1)
        return masked[mask.flatten() > 0].unflatten(0, (len(x), -1))


class Pad(nn.Module):
    def __init__(self, more):
        super().__init__()
        self.more = more

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class BasicBlock(nn.Module):
    def __init__(self, conv, channels_in, channels, stride, shortcut, name):
        super().__init__()
        self.conv1 = conv(channels_in, channels, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        changes_shape = stride != 1 or channels_in != channels
        self.name = name
        self.add_module(name, shortcut(channels_in, channels, stride) if changes_shape else nn.Sequential())

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + getattr(self, self.name)(x))


def plain_conv(channels_in, channels, kernel, stride=1, padding=0):
    return nn.Conv2d(channels_in, channels, kernel, stride, padding, bias=False)


def _stages(conv, channels_in, widths, blocks, shortcut, name='shortcut'):
    for index, width in enumerate(widths):
        layers = []
        for block in range(blocks):
            layers.append(BasicBlock(conv, channels_in, width, 2 if index and not block else 1, shortcut, name))
            channels_in = width
        yield f'layer{index + 1}', nn.Sequential(*layers)


class Router(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.conv1 = plain_conv(3, 16, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(16)
        for name, stage in _stages(plain_conv, 16, (16, 32, 64), 3, lambda i, o, s: Pad(o - i)):
            self.add_module(name, stage)
        self.fc = nn.Linear(64, experts)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.avg_pool2d(x, x.shape[-1]).flatten(1))


class Network(nn.Module):
    """Base: a router that is hung below the network and below every expert layer, or none."""

    def __init__(self):
        super().__init__()
        self.router = None

    def hang(self, router):
        convs = [module for module in self.modules() if isinstance(module, ExpertConv)]
        for module in (self, *convs):
            module.router = router
        return self

    def forward(self, x):
        if self.router is not None:
            logits = self.router(x)
            for module in self.modules():
                if isinstance(module, ExpertConv):
                    module.logits = logits
        return self.run(x)


class ResNet18(Network):
    """With ``imagenet``, a 7x7 stem and max pooling, experts in the shortcuts too, and other names for two layers."""

    def __init__(self, stem, width, experts=1, classes=10, imagenet=False):
        super().__init__()
        self.imagenet = imagenet
        self.conv1 = plain_conv(3, stem, 7, 2, 3) if imagenet else plain_conv(3, stem, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(stem)

        def conv(*args):
            return ExpertConv(*args, experts=experts) if experts > 1 else plain_conv(*args)

        def shortcut(channels_in, channels, stride):
            kind = conv if imagenet else plain_conv
            return nn.Sequential(kind(channels_in, channels, 1, stride, 0), nn.BatchNorm2d(channels))

        widths = [width * 2**i for i in range(4)]
        for name, stage in _stages(conv, stem, widths, 2, shortcut, 'downsample' if imagenet else 'shortcut'):
            self.add_module(name, stage)
        self.add_module('fc' if imagenet else 'linear', nn.Linear(8 * width, classes))

    def run(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if self.imagenet:
            x = F.max_pool2d(x, 3, 2, 1)
        for index in range(4):
            x = getattr(self, f'layer{index + 1}')(x)
        return (self.fc if self.imagenet else self.linear)(x.mean((2, 3)))


class WideBlock(nn.Module):
    """In a mixture, a block that changes the shape convolves its raw input and leaves ``bn1`` unused."""

    def __init__(self, conv, channels_in, channels, stride, raw):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv(channels_in, channels, 3, stride, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, 1, 1)
        self.convShortcut = conv(channels_in, channels, 1, stride, 0) if channels_in != channels else None
        self.raw = raw

    def forward(self, x):
        active = F.relu(self.bn1(x))
        if self.convShortcut is None:
            return x + self.conv2(F.relu(self.bn2(self.conv1(active))))
        x = x if self.raw else active
        return self.convShortcut(x) + self.conv2(F.relu(self.bn2(self.conv1(x))))


class WideResNet28(Network):
    """With ``imagenet``, a 7x7 stem, its norm and max pooling."""

    def __init__(self, stem, widen, experts=1, classes=10, imagenet=False):
        super().__init__()

        def conv(*args):
            return ExpertConv(*args, experts=experts) if experts > 1 else plain_conv(*args)

        self.conv1 = plain_conv(3, stem, 7, 2, 3) if imagenet else plain_conv(3, stem, 3, 1, 1)
        self.bn0 = nn.BatchNorm2d(stem) if imagenet else None
        channels = stem
        for index in range(3):
            width = stem * widen * 2**index
            layers = []
            for block in range(4):
                layers.append(WideBlock(conv, channels, width, 2 if index and not block else 1, experts > 1))
                channels = width
            block = nn.Module()
            block.layer = nn.Sequential(*layers)
            self.add_module(f'block{index + 1}', block)
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)

    def run(self, x):
        x = self.conv1(x)
        if self.bn0 is not None:
            x = F.max_pool2d(F.relu(self.bn0(x)), 3, 2, 1)
        for block in (self.block1, self.block2, self.block3):
            x = block.layer(x)
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class VGG16(Network):
    def __init__(self, width, experts=1, classes=10):
        super().__init__()
        layers, channels = [], 3
        for index, (factor, convs) in enumerate(((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))):
            if index:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convs):
                shared = experts == 1 or not layers
                args = (channels, factor * width, 3, 1, 1)
                layers.append(plain_conv(*args) if shared else ExpertConv(*args, experts=experts))
                channels = factor * width
                layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        linear = [nn.Linear(4 * channels, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes)]
        self.classifier = nn.Sequential(*linear)

    def run(self, x):
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 2).flatten(1))


class DenseNet40(Network):
    """Dense only: the reference code cannot build the mixture."""

    def __init__(self, growth, stem, classes=10):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module('conv0', plain_conv(3, stem, 3, 1, 1))
        channels = stem
        for index in range(3):
            block = nn.Module()
            for layer in range(6):
                parts = nn.Module()
                parts.norm1 = nn.BatchNorm2d(channels)
                parts.conv1 = plain_conv(channels, 4 * growth, 1)
                parts.norm2 = nn.BatchNorm2d(4 * growth)
                parts.conv2 = plain_conv(4 * growth, growth, 3, 1, 1)
                block.add_module(f'denselayer{layer + 1}', parts)
                channels += growth
            self.features.add_module(f'denseblock{index + 1}', block)
            if index < 2:
                transition = nn.Module()
                transition.norm = nn.BatchNorm2d(channels)
                transition.conv = plain_conv(channels, channels // 2, 1)
                self.features.add_module(f'transition{index + 1}', transition)
                channels //= 2
        self.features.add_module('norm_final', nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, classes)

    def run(self, x):
        features = self.features
        x = features.conv0(x)
        for index in range(3):
            for part in getattr(features, f'denseblock{index + 1}').children():
                hidden = part.conv1(F.relu(part.norm1(x)))
                x = torch.cat([x, part.conv2(F.relu(part.norm2(hidden)))], dim=1)
            if index < 2:
                transition = getattr(features, f'transition{index + 1}')
                x = F.avg_pool2d(transition.conv(F.relu(transition.norm(x))), 2)
        return self.classifier(F.relu(features.norm_final(x)).mean((2, 3)))
