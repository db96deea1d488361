"""Small things that every package uses."""

from __future__ import annotations

import os
import os.path as osp
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
from mmengine.model import BaseAveragedModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

# What MMPretrain's backbones call the setting that saves memory so.
_CHECKPOINTING = ('with_cp', 'use_checkpoint', 'memory_efficient')

#: Ending of files that are being written. One that is left over was cut off by a kill, and is surely ours to delete.
PARTIAL = '.mmadvmoe-partial'


def bare_model(model: nn.Module) -> nn.Module:
    """The model itself, inside of distributed wrappers, weight averages or a hookless ``nn.Sequential`` of one."""
    if is_model_wrapper(model) or isinstance(model, (BaseAveragedModel, AveragedModel)):
        return bare_model(model.module)
    if type(model) is nn.Sequential and len(model) == 1 and not (model._forward_hooks or model._forward_pre_hooks):
        return bare_model(model[0])
    return model


def single_wrappers(optim_wrapper: OptimWrapper | OptimWrapperDict) -> list[OptimWrapper]:
    """The optimizer wrappers of a training, of which one in turns has two."""
    return list(optim_wrapper.values()) if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]


def checkpointing(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that are set to compute their activations anew in the backward pass, each with its attribute."""
    return [(module, key) for module in model.modules() for key in _CHECKPOINTING if getattr(module, key, None) is True]


def norms_to_eval(module: nn.Module) -> None:
    """Put the batch norms of a module into eval mode, as ``norm_eval`` of a backbone asks for."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()


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


def some(parts: Iterable[Any], most: int = 5, separator: str = ', ') -> str:
    """The first few of many things, for a message, and how many more there are."""
    parts = [str(part) for part in parts]
    more = f'{separator.strip(", ")} and {len(parts) - most} more' if len(parts) > most else ''
    return (separator.join(parts[:most]) or 'nothing') + more


def type_name(kind: str | type) -> str:
    """A type as configs give it, a name with or without a scope or a class, as its name without a scope."""
    return kind.split('.')[-1] if isinstance(kind, str) else kind.__name__


def as_plain(value: Any) -> Any:
    """Rewrite a value as JSON and YAML can hold it; what they cannot (an object of a config, say) by its name.

    Tensors, arrays and numbers of NumPy become numbers and lists, keys become text.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [as_plain(each) for each in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    return value.__name__ if isinstance(value, (type, FunctionType)) else repr(value)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file under another name, force it to disk, and rename it over the old one; missing folders are made.

    Raises:
        OSError: If it cannot be written, because the disk is full say. What was there before is unharmed, and nothing
            half written is left.
    """
    path = os.fspath(path)
    folder = osp.dirname(path) or '.'
    partial = osp.join(folder, f'.{osp.basename(path)}.{os.getpid()}{PARTIAL}')
    try:
        os.makedirs(folder, exist_ok=True)
        with open(partial, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(folder)
    except OSError:
        if osp.exists(partial):
            os.remove(partial)
        raise


def _sync_folder(folder: str) -> None:
    """Force the renaming itself to disk, before anything older is deleted."""
    if os.name == 'posix':
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
