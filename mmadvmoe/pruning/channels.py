"""Which channels of a network can be removed, and what has to go with them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import nn

# Operations (of autograd) that give channel c of their output from channel c of their inputs alone. A view may only
# fold positions into channels, as before a linear layer; that the sizes fit is checked below.
_KEEP_CHANNELS = (
    'Relu',
    'Gelu',
    'Silu',
    'LeakyRelu',
    'Add',
    'MaxPool2DWithIndices',
    'AvgPool2D',
    'AdaptiveAvgPool2D',
    'Mean',
    'View',
    'UnsafeView',
    'Squeeze',
    'Clone',
    'Alias',
)


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


class _Sets:
    """Disjoint sets of autograd nodes: those in one set have the same channels."""

    def __init__(self) -> None:
        self._parent: dict[object, object] = {}

    def find(self, node: object) -> object:
        while (parent := self._parent.get(node, node)) is not node:
            node = parent
        return node

    def join(self, one: object, other: object) -> None:
        self._parent[self.find(one)] = self.find(other)


def find_channel_groups(model: nn.Module, input_shape: Sequence[int]) -> list[ChannelGroup]:
    """Find the channels that can be removed from a network without any other change to it.

    The layers are followed along the graph that autograd records of one forward pass, so nothing need be known about
    the architecture. Residual sums tie channels together; channels that are concatenated, sliced, or that leave the
    network are not on offer.

    Args:
        model (nn.Module): Gives a tensor for a batch of images. It is left as it was.
        input_shape (Sequence[int]): (C, H, W).

    Returns:
        list[ChannelGroup]: In the order of their first producers in the forward pass.
    """
    calls, output = _trace(copy.deepcopy(model), input_shape)
    made_by = {call.made: call for call in calls}
    sets, fixed = _Sets(), {output}
    seen, stack = {output}, [output]
    while stack:
        node = stack.pop()
        call = made_by.get(node)
        if call is not None:
            read = [call.read] if call.read is not None else []
            if isinstance(call.module, _BatchNorm) and read:
                sets.join(node, call.read)
        else:
            read = [each for each, _ in node.next_functions if each is not None]
            if _keeps_channels(node) and not any(map(_is_parameter, read)):
                for each in read:
                    sets.join(node, each)
            else:
                fixed.update((node, *read))
        stack.extend(each for each in read if each not in seen)
        seen.update(read)
    return _groups(calls, sets, {sets.find(node) for node in fixed})


def _groups(calls: Sequence[_Call], sets: _Sets, fixed: set[object]) -> list[ChannelGroup]:
    members: dict[object, tuple[list, list, list]] = {}
    for call in calls:
        is_norm = isinstance(call.module, _BatchNorm)
        members.setdefault(sets.find(call.made), ([], [], []))[1 if is_norm else 0].append(call)
        if not is_norm and call.read is not None:
            members.setdefault(sets.find(call.read), ([], [], []))[2].append(call)
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
    # A layer that is called twice belongs to two places at once, and a linear layer on more than a vector leaves a
    # node of another kind: both stay unknown nodes, whose channels are fixed.
    known = [call for call in calls if times[call.module] == 1 and type(call.made).__name__ != 'ViewBackward0']
    return known, output.grad_fn


def _keeps_channels(node: object) -> bool:
    return type(node).__name__.split('Backward')[0] in _KEEP_CHANNELS


def _is_parameter(node: object) -> bool:
    return type(node).__name__ == 'AccumulateGrad'


def _out_channels(module: nn.Module) -> int:
    return module.out_channels if isinstance(module, nn.Conv2d) else module.out_features


def _reads(module: nn.Module, channels: int) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.in_channels == channels
    return module.in_features % channels == 0
