"""Channels of a network: which can be removed, how many a budget of multiply-adds keeps, and their removal."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor, nn

from mmadvmoe.cost import flop_analyzer

# Operations (of autograd) that give channel c of their output from channel c of their inputs alone. A view may only
# fold positions into channels, as before a linear layer; that the sizes fit is checked below.
_KEEP_CHANNELS = (
    'Relu Gelu Silu LeakyRelu Add MaxPool2DWithIndices AvgPool2D AdaptiveAvgPool2D Mean View UnsafeView Squeeze Clone '
    'Alias'
).split()


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together: channel c of all these layers, or of none.

    Attributes:
        channels (int): C.
        producers (tuple[str, ...]): Names of convolutions and linear layers whose outputs they are.
        norms (tuple[str, ...]): Names of the batch norms they pass.
        consumers (tuple[str, ...]): Names of convolutions and linear layers that read them. A linear layer may read
            several positions of each channel.
    """

    channels: int
    producers: tuple[str, ...]
    norms: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class _Call:
    name: str
    module: nn.Module
    read: object  # the autograd node that made the input, None for the image
    made: object  # the node that made the output


def find_channel_groups(model: nn.Module, input_shape: Sequence[int]) -> list[ChannelGroup]:
    """Find the channels that can be removed from a network without any other change to it.

    The layers are followed along the graph that autograd records of one forward pass of an image (C, H, W), so nothing
    need be known about the architecture, but that it gives a tensor. Residual sums tie channels together; channels that
    are concatenated, sliced, or that leave the network are not on offer. The model is left as it was.

    Returns:
        The groups, in the order of their first producers in the forward pass.
    """
    calls, output = _trace(copy.deepcopy(model), input_shape)
    made_by = {call.made: call for call in calls}
    # Nodes in one set have the same channels.
    sets, fixed = DisjointSet([output]), {output}
    seen, stack = {output}, [output]
    while stack:
        node = stack.pop()
        call = made_by.get(node)
        if call is not None:
            read = [call.read] if call.read is not None else []
            same = isinstance(call.module, _BatchNorm)
        else:
            read = [each for each, _ in node.next_functions if each is not None]
            kinds = [type(each).__name__ for each in read]
            same = type(node).__name__.split('Backward')[0] in _KEEP_CHANNELS and 'AccumulateGrad' not in kinds
            if not same:
                fixed.update((node, *read))
        for each in read:
            sets.add(each)
            if same:
                sets.merge(node, each)
        stack.extend(each for each in read if each not in seen)
        seen.update(read)
    return _groups(calls, sets, {sets[node] for node in fixed})


def _groups(calls: Sequence[_Call], sets: DisjointSet, fixed: set[object]) -> list[ChannelGroup]:
    members: dict[object, tuple[list, list, list]] = {}
    for call in calls:
        is_norm = isinstance(call.module, _BatchNorm)
        members.setdefault(sets[call.made], ([], [], []))[1 if is_norm else 0].append(call)
        if not is_norm and call.read is not None:
            members.setdefault(sets[call.read], ([], [], []))[2].append(call)
    groups = []
    for root, (producers, norms, consumers) in members.items():
        if root in fixed or not producers or not consumers:
            continue
        channels = _out_channels(producers[0].module)
        fits = (
            all(_out_channels(call.module) == channels for call in producers)
            and all(call.module.num_features == channels for call in norms)
            and all(_reads(call.module, channels) for call in consumers)
        )
        if fits and channels > 1:
            names = [tuple(call.name for call in part) for part in (producers, norms, consumers)]
            groups.append(ChannelGroup(channels, *names))
    return groups


def _trace(model: nn.Module, input_shape: Sequence[int]) -> tuple[list[_Call], object]:
    """The layers with channels in the order of their calls, and the node of the output."""
    calls: list[_Call] = []
    times: dict[nn.Module, int] = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            times[module] = times.get(module, 0) + 1
            calls.append(_Call(name, module, inputs[0].grad_fn, output.grad_fn))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, _BatchNorm)) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            module.register_forward_hook(note(name))
    model.eval()
    model.requires_grad_(True)
    parameter = next(model.parameters())
    with torch.enable_grad():
        output = model(torch.zeros((1, *input_shape), dtype=parameter.dtype, device=parameter.device))
    # A layer that is called twice is at two points of the graph, and a linear layer on more than a vector leaves a node
    # of another kind: both stay unknown nodes, whose channels are fixed.
    known = [call for call in calls if times[call.module] == 1 and type(call.made).__name__ != 'ViewBackward0']
    return known, output.grad_fn


def _out_channels(module: nn.Module) -> int:
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


def _reads(module: nn.Module, channels: int) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.in_channels == channels
    return module.in_features % channels == 0


def fit_channels(
    classifier: nn.Module, groups: Sequence[ChannelGroup], input_shape: Sequence[int], target_gflops: float
) -> list[int]:
    """Choose how many channels each group keeps, so that the network costs as much as a target and no more.

    Every group keeps the same share, as near as whole channels allow; what the rounding leaves of the budget goes to
    the groups with the smallest shares. No group is left without a channel.

    Args:
        classifier (nn.Module): The dense network, in eval mode.
        groups, input_shape: As for, and from, :func:`find_channel_groups`.
        target_gflops (float): 1e9 multiply-adds per image.

    Raises:
        ValueError: The target is below what one channel in each group costs, or above the dense network.
    """
    analyzer = flop_analyzer(classifier, input_shape)
    # Of each layer: its multiply-adds, and the groups that scale them.
    scaled: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        for name in (*group.producers, *group.norms, *group.consumers):
            scaled.setdefault(name, []).append(index)
    layers = [(analyzer.total(f'classifier.{name}'), indices) for name, indices in scaled.items()]
    rest = analyzer.total() - sum(flops for flops, _ in layers)

    def cost(counts: Sequence[int]) -> float:
        shares = [count / group.channels for count, group in zip(counts, groups)]
        return sum((math.prod([flops, *(shares[index] for index in indices)]) for flops, indices in layers), rest)

    target = target_gflops * 1e9
    least, most = cost([1] * len(groups)), cost([group.channels for group in groups])
    if not least <= target <= most * (1 + 1e-9):
        raise ValueError(
            f'target: its network costs {target:.4g} multiply-adds, but by removing channels from this one only '
            f'{least:.4g} to {most:.4g} can be reached'
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(_at(middle, groups)) <= target else (low, middle)
    counts = _at(low, groups)
    while True:
        affordable = []
        for index, group in enumerate(groups):
            more = counts[:index] + [counts[index] + 1] + counts[index + 1 :]
            if counts[index] < group.channels and cost(more) <= target:
                affordable.append((counts[index] / group.channels, index))
        if not affordable:
            return counts
        counts[min(affordable)[1]] += 1


def _at(share: float, groups: Sequence[ChannelGroup]) -> list[int]:
    return [max(1, round(share * group.channels)) for group in groups]


@torch.no_grad()
def remove_channels(model: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> None:
    """Shrink the layers of a network, in place, to the channels ``kept``: of each group ascending indices, int64."""
    for group, index in zip(groups, kept):
        for name in group.producers:
            layer = model.get_submodule(name)
            _shrink(layer, 'weight', 0, index)
            _shrink(layer, 'bias', 0, index)
            setattr(layer, 'out_channels' if isinstance(layer, nn.Conv2d) else 'out_features', len(index))
        for name in group.norms:
            norm = model.get_submodule(name)
            for part in ('weight', 'bias', 'running_mean', 'running_var'):
                _shrink(norm, part, 0, index)
            norm.num_features = len(index)
        for name in group.consumers:
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Conv2d):
                _shrink(layer, 'weight', 1, index)
                layer.in_channels = len(index)
            else:
                positions = layer.in_features // group.channels
                features = (index[:, None] * positions + torch.arange(positions, device=index.device)).flatten()
                _shrink(layer, 'weight', 1, features)
                layer.in_features = len(features)


def _shrink(module: nn.Module, name: str, dim: int, index: Tensor) -> None:
    old = getattr(module, name)
    if old is None:
        return
    new = old.index_select(dim, index.to(old.device))
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
