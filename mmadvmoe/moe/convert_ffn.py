"""Swap feed-forward networks of a built transformer for networks with N experts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from mmcv.cnn.bricks.transformer import FFN
from mmpretrain.models.backbones.convnext import ConvNeXtBlock
from mmpretrain.models.backbones.deit3 import DeiT3FFN
from torch import nn

from .convert import compile_patterns, shortened
from .expert_ffn import ExpertFFN
from .routing import RouteContext
from .token_router import TokenRouter

#: The modules that hold a feed-forward network. Exact classes: a subclass may compute something else.
FFN_KINDS = (FFN, DeiT3FFN, ConvNeXtBlock)


def match_ffns(network: nn.Module, include: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Names of the modules whose feed-forward network is to get experts.

    Args:
        network (nn.Module): The dense network.
        include (Sequence[str]): Regular expressions, searched in the names of the modules that hold a feed-forward
            network: such as ``'layers.3.ffn'`` in a ``VisionTransformer``, ``'stages.0.blocks.1.ffn'`` in a
            ``SwinTransformer`` and ``'stages.0.1'`` in a ``ConvNeXt``.
        exclude (Sequence[str]): Regular expressions that take modules out again.

    Returns:
        list[str]: Names in the order of the network's modules.

    Raises:
        ValueError: The network has no feed-forward network, a pattern is no regular expression or matches none, or
            what is computed there depends on more than one token.
    """
    holders = [name for name, module in network.named_modules() if type(module) in FFN_KINDS]
    if not holders:
        kinds = ', '.join(kind.__name__ for kind in FFN_KINDS)
        raise ValueError(
            f"backbone.routing='token' routes the tokens of feed-forward networks, and {type(network).__name__} has "
            f"none (of {kinds}); use routing='image' or 'layer'"
        )
    patterns = compile_patterns(include, exclude)
    allowed = [name for name in holders if not any(pattern.search(name) for pattern in patterns['exclude'])]
    chosen: set[str] = set()
    for pattern in patterns['include']:
        matched = [name for name in allowed if pattern.search(name)]
        if not matched:
            raise ValueError(
                f'backbone.include pattern {pattern.pattern!r} matches no feed-forward network of '
                f'{type(network).__name__}; it has {shortened(holders)}'
            )
        chosen.update(matched)
    for name in chosen:
        module = network.get_submodule(name)
        if isinstance(module, ConvNeXtBlock) and (module.grn is not None or not module.linear_pw_conv):
            raise ValueError(
                f'{name!r} of {type(network).__name__} cannot hold token experts: they need linear_pw_conv=True, and '
                'use_grn=False because that norm is over all tokens of an image'
            )
    return [name for name in holders if name in chosen]


def convert_ffns(
    network: nn.Module,
    names: Sequence[str],
    num_experts: int,
    context: RouteContext,
    build_router: Callable[[int], TokenRouter],
) -> list[ExpertFFN]:
    """Give N experts to feed-forward networks of ``network``, in place.

    What surrounds the experts' layers (layer scale, stochastic depth, the residual connection) stays as it is.

    Args:
        network (nn.Module): The dense network.
        names (Sequence[str]): As :func:`match_ffns` gives them.
        num_experts (int): N >= 2.
        context (RouteContext): Shared by all expert layers and their backbone.
        build_router (Callable): Makes a router for tokens of so many channels.

    Returns:
        list[ExpertFFN]: In the order of ``names``.
    """
    converted = []
    for name in names:
        module = network.get_submodule(name)
        # Names inside are those below `module`, so that the parameters of a dense network find their place.
        inside = ('pointwise_conv1', 'act', 'pointwise_conv2') if isinstance(module, ConvNeXtBlock) else ('layers',)
        dense = nn.Sequential(OrderedDict((part, module.get_submodule(part)) for part in inside))
        width = next(part.in_features for part in dense.modules() if isinstance(part, nn.Linear))
        layer = ExpertFFN(dense, num_experts, context, build_router(width))
        setattr(module, inside[0], layer)
        for part in inside[1:]:
            setattr(module, part, nn.Identity())
        converted.append(layer)
    return converted
