"""Small things that every package uses."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

from mmengine.model import is_model_wrapper
from torch import nn

# What MMPretrain's backbones call the setting that saves memory so.
_CHECKPOINTING = ('with_cp', 'use_checkpoint', 'memory_efficient')


def bare_model(model: nn.Module) -> nn.Module:
    """The model itself, where a distributed wrapper may stand around it."""
    return model.module if is_model_wrapper(model) else model


def checkpointing(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that are set to compute their activations anew in the backward pass, each with its attribute."""
    return [(module, key) for module in model.modules() for key in _CHECKPOINTING if getattr(module, key, None) is True]


def choose(name: Any, allowed: Collection[str], key: str) -> Any:
    """Give ``name`` back if it is allowed.

    Args:
        name (str): What a config or an argument says.
        allowed (Collection[str]): The names on offer, in the order in which the message lists them.
        key (str): Config key or argument, for the message.

    Raises:
        ValueError: It is not allowed; the message names key, value, the nearest name and all that are allowed.
    """
    if name in allowed:
        return name
    raise ValueError(f'{key}={name!r} is unknown{did_you_mean(name, allowed)}; allowed: {", ".join(map(str, allowed))}')


def did_you_mean(name: Any, allowed: Collection[str]) -> str:
    """The hint at the nearest allowed name, for the middle of a message; empty if none is near."""
    near = get_close_matches(str(name), [str(each) for each in allowed], n=1, cutoff=0.5)
    return f' (did you mean {near[0]!r}?)' if near else ''
