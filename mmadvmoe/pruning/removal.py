"""Remove channels from a network for good."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .channels import ChannelGroup


@torch.no_grad()
def remove_channels(model: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> None:
    """Shrink the layers of a network, in place, to the channels that are kept.

    Args:
        model (nn.Module): The network that the groups were found in.
        groups (Sequence[ChannelGroup]): The channels concerned.
        kept (Sequence[Tensor]): For each group the indices of the channels to keep, int64, in ascending order.
    """
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
