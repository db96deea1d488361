"""Find the layers and feed-forward networks of a built dense network that are to get experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mmcv.cnn.bricks.transformer import FFN
from mmpretrain.models.backbones.convnext import ConvNeXtBlock
from mmpretrain.models.backbones.deit3 import DeiT3FFN
from mmpretrain.models.utils.attention import BEiTAttention, CrossMultiheadAttention, WindowMSAV2
from torch import nn

from .expert_layers import EXPERT_LAYERS

#: The modules that hold a feed-forward network. Exact classes: a subclass may compute something else.
FFN_KINDS = (FFN, DeiT3FFN, ConvNeXtBlock)
#: Modules that compute with the weights of layers in them without calling these layers.
READS_WEIGHTS = {BEiTAttention: ('qkv',), WindowMSAV2: ('qkv',), CrossMultiheadAttention: ('q', 'k', 'v')}
_SHOWN = 12  # names that an error lists


def match_layers(
    network: nn.Module, include: Sequence[str], exclude: Sequence[str] = (), share_stem: bool = True
) -> list[str]:
    """Find the layers to convert.

    Args:
        network (nn.Module): The dense network.
        include (Sequence[str]): Regular expressions, searched in the layers' names.
        exclude (Sequence[str]): Regular expressions that take layers out again.
        share_stem (bool): Refuse to convert the first layer. Defaults to True.

    Returns:
        list[str]: Names in the order of the network's modules.

    Raises:
        ValueError: A pattern is no regular expression or matches no layer, the layers that are left cannot be
            converted, another module reads the weights of one of them, or one is the stem.
    """
    convertible = [name for name, module in network.named_modules() if type(module) in EXPERT_LAYERS]
    kinds = ', '.join(sorted({kind.__name__ for kind in EXPERT_LAYERS}))
    if not convertible:
        raise ValueError(f'{type(network).__name__} has no layer of a kind that can hold experts: {kinds}')
    layers = [name for name, each in network.named_modules() if not [*each.children()] and [*each.parameters()]]
    chosen: set[str] = set()
    for pattern, matched in _matches(layers, include, exclude, f'layer of {type(network).__name__}', convertible):
        for name in (name for name in matched if name not in convertible):
            raise ValueError(
                f'backbone.include pattern {pattern!r} takes in {name!r}, a '
                f'{type(network.get_submodule(name)).__name__}, which cannot hold experts; convertible are {kinds}. '
                'Narrow the pattern or name the layer in backbone.exclude'
            )
        chosen.update(matched)
    for name in (name for name in convertible if name in chosen):
        holder, _, layer = name.rpartition('.')
        kind = type(network.get_submodule(holder))
        if layer in READS_WEIGHTS.get(kind, ()):
            raise ValueError(
                f'{name!r} of {type(network).__name__} cannot hold experts: its {kind.__name__} reads the weights and '
                'never calls the layer; name it in backbone.exclude, or give experts to the layers of the feed-forward '
                "networks: include=['ffn']"
            )
    if share_stem and convertible[0] in chosen:
        raise ValueError(
            f'backbone.include takes in the stem {convertible[0]!r}, which every pathway shares; narrow the pattern, '
            'name the layer in backbone.exclude, or set backbone.share_stem=False'
        )
    return [name for name in convertible if name in chosen]


def match_ffns(
    network: nn.Module, include: Sequence[str], exclude: Sequence[str] = (), share_stem: bool = True
) -> list[str]:
    """Find the modules whose feed-forward network is to get experts, none of which is a stem.

    Arguments and result are those of :func:`match_layers`.

    The regular expressions are searched in the names of the modules that hold a feed-forward network: such as
    ``'layers.3.ffn'`` in a ``VisionTransformer``, ``'stages.0.blocks.1.ffn'`` in a ``SwinTransformer`` and
    ``'stages.0.1'`` in a ``ConvNeXt``.

    Raises:
        ValueError: The network has no feed-forward network, a pattern is no regular expression or matches none, or
            the computation there depends on more than one token.
    """
    holders = [name for name, module in network.named_modules() if type(module) in FFN_KINDS]
    if not holders:
        kinds = ', '.join(kind.__name__ for kind in FFN_KINDS)
        raise ValueError(
            f"backbone.routing='token' routes the tokens of feed-forward networks, and {type(network).__name__} has "
            f"none (of {kinds}); use routing='image' or 'layer'"
        )
    chosen: set[str] = set()
    kind = f'feed-forward network of {type(network).__name__}'
    for _, matched in _matches(holders, include, exclude, kind, holders):
        chosen.update(matched)
    for name in chosen:
        module = network.get_submodule(name)
        if isinstance(module, ConvNeXtBlock) and (module.grn is not None or not module.linear_pw_conv):
            raise ValueError(
                f'{name!r} of {type(network).__name__} cannot hold token experts: they need linear_pw_conv=True, and '
                'use_grn=False because that norm is over all tokens of an image'
            )
    return [name for name in holders if name in chosen]


def _matches(
    names: Sequence[str], include: Sequence[str], exclude: Sequence[str], kind: str, offered: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Give each pattern to include, with the names that it matches and no pattern excludes.

    Names of ``offered`` are shown where a pattern matches nothing of this ``kind``.
    """
    if isinstance(include, str) or not include:
        raise ValueError(f'backbone.include={include!r} must be a list of at least one regular expression')
    compiled: dict[str, list[re.Pattern]] = dict(include=[], exclude=[])
    for key, patterns in dict(include=include, exclude=exclude).items():
        for pattern in patterns:
            try:
                compiled[key].append(re.compile(pattern))
            except re.error as error:
                raise ValueError(f'backbone.{key} pattern {pattern!r} is no regular expression: {error}') from error
    allowed = [name for name in names if not any(pattern.search(name) for pattern in compiled['exclude'])]
    for pattern in compiled['include']:
        matched = [name for name in allowed if pattern.search(name)]
        if not matched:
            shown = ', '.join(offered[:_SHOWN]) + (f', ... ({len(offered)} in all)' if len(offered) > _SHOWN else '')
            raise ValueError(f'backbone.include pattern {pattern.pattern!r} matches no {kind}; it has {shown}')
        yield pattern.pattern, matched
