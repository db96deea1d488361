"""Swap layers of a built dense network for expert layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Optional

from torch import nn

from .expert_layers import EXPERT_LAYERS, ExpertLayer
from .routers import BaseRouter
from .routing import RouteContext


def _is_convertible(module: nn.Module) -> bool:
    return type(module) in EXPERT_LAYERS


def match_layers(network: nn.Module, include: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Names of the layers to convert.

    Args:
        network (nn.Module): The dense network.
        include (Sequence[str]): Regular expressions, searched in the layers' names.
        exclude (Sequence[str]): Regular expressions that take layers out again.

    Returns:
        list[str]: Names in the order of the network's modules.

    Raises:
        ValueError: A pattern is no regular expression or matches no layer, the layers that are left cannot be
            converted, or one of them is the stem.
    """
    convertible = [name for name, module in network.named_modules() if _is_convertible(module)]
    if not convertible:
        raise ValueError(f'{type(network).__name__} has no layer of a kind that can hold experts: {_kinds()}')
    patterns = compile_patterns(include, exclude)
    excluded = [name for name, _ in network.named_modules() if any(p.search(name) for p in patterns['exclude'])]
    chosen = set()
    for pattern in patterns['include']:
        matched = [
            name
            for name, module in network.named_modules()
            if name not in excluded
            and pattern.search(name)
            and not any(True for _ in module.children())
            and any(True for _ in module.parameters())
        ]
        if not matched:
            raise ValueError(
                f'backbone.include pattern {pattern.pattern!r} matches no layer of {type(network).__name__}; '
                f'it has {shortened(convertible)}'
            )
        for name in matched:
            if not _is_convertible(network.get_submodule(name)):
                kind = type(network.get_submodule(name)).__name__
                raise ValueError(
                    f'backbone.include pattern {pattern.pattern!r} takes in {name!r}, a {kind}, which cannot hold '
                    f'experts; convertible are {_kinds()}. Narrow the pattern or name the layer in backbone.exclude'
                )
        chosen.update(matched)
    if convertible[0] in chosen:
        raise ValueError(
            f'backbone.include takes in the stem {convertible[0]!r}, which every pathway shares; narrow the pattern or '
            'name the layer in backbone.exclude'
        )
    return [name for name in convertible if name in chosen]


def convert_layers(
    network: nn.Module,
    names: Sequence[str],
    num_experts: int,
    context: RouteContext,
    build_router: Optional[Callable[[nn.Module], BaseRouter]] = None,
) -> list[ExpertLayer]:
    """Replace layers of ``network``, in place, by layers with N experts.

    Args:
        network (nn.Module): The dense network.
        names (Sequence[str]): Layers to replace, as :func:`match_layers` gives them.
        num_experts (int): N >= 2.
        context (RouteContext): Shared by all expert layers and their backbone.
        build_router (Callable, optional): Makes the own router of a dense layer, for layer-level routing.

    Returns:
        list[ExpertLayer]: The new layers, in the order of ``names``.
    """
    layers = []
    for name in names:
        dense = network.get_submodule(name)
        router = build_router(dense) if build_router is not None else None
        layer = EXPERT_LAYERS[type(dense)](dense, num_experts, context, router)
        network.set_submodule(name, layer)
        layers.append(layer)
    return layers


def compile_patterns(include: Sequence[str], exclude: Sequence[str]) -> dict[str, list[re.Pattern]]:
    """Compile ``backbone.include`` and ``backbone.exclude``, under these keys.

    Raises:
        ValueError: There is no pattern to include, or one is no regular expression.
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
    return compiled


def _kinds() -> str:
    return ', '.join(sorted({kind.__name__ for kind in EXPERT_LAYERS}))


def shortened(names: Sequence[str], most: int = 12) -> str:
    """The names for an error message, at most ``most`` of them."""
    shown = ', '.join(names[:most])
    return shown if len(names) <= most else f'{shown}, ... ({len(names)} in all)'
