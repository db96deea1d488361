"""Builds one optimizer for the experts and one for the router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmpretrain.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mmadvmoe.moe import GROUPS, split_parameters
from mmadvmoe.runtime.preflight import check_groups

from .optim_wrapper import AlternatingOptimWrapper

NamedParameters = list[tuple[str, nn.Parameter]]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class AlternatingOptimWrapperConstructor:
    """Gives every parameter to exactly one of two optimizers, experts θ or router ψ.

    Each group takes what ``optim_wrapper`` takes in any MMPretrain config, with its own ``type``,
    ``constructor``, ``paramwise_cfg``, ``clip_grad`` and ``accumulative_counts``. Names in
    ``custom_keys`` are the full names of the parameters.

    Args:
        optim_wrapper_cfg (dict): ``experts`` and ``router``, each the config of an optimizer
            wrapper.
        paramwise_cfg (dict, optional): Not served here; it belongs inside the groups.

    Raises:
        ValueError: A group or its optimizer is missing, or a key is not a group.
        TypeError: A group is not a dict.

    Examples:
        >>> optim_wrapper = dict(
        ...     constructor='AlternatingOptimWrapperConstructor',
        ...     experts=dict(
        ...         type='OptimWrapper',
        ...         optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=5e-4),
        ...         paramwise_cfg=dict(norm_decay_mult=0.)),
        ...     router=dict(
        ...         type='OptimWrapper',
        ...         optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4),
        ...         clip_grad=dict(max_norm=1.)))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None) -> None:
        if paramwise_cfg is not None:
            raise ValueError(
                'optim_wrapper.paramwise_cfg is not served by AlternatingOptimWrapperConstructor; '
                'set optim_wrapper.experts.paramwise_cfg and optim_wrapper.router.paramwise_cfg'
            )
        check_groups('optim_wrapper', optim_wrapper_cfg)
        for name in GROUPS:
            group = optim_wrapper_cfg[name]
            if not isinstance(group, dict):
                raise TypeError(
                    f'optim_wrapper.{name} must be the config (dict) of an optimizer wrapper, got {group!r}'
                )
            if 'optimizer' not in group:
                raise ValueError(
                    f"optim_wrapper.{name} has no 'optimizer'; give it one, such as optimizer=dict(type='SGD', lr=0.1)"
                )
        self.optim_wrapper_cfg = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> AlternatingOptimWrapper:
        """Build both optimizer wrappers for a model, which may be wrapped for distributed training.

        Raises:
            ValueError: The model has no router, a group has nothing to train, or a parameter was
                left out by, or given twice to, the constructors of the groups.
        """
        if is_model_wrapper(model):
            model = model.module
        groups = split_parameters(model)
        if not groups['router']:
            raise ValueError(
                f'{type(model).__name__} has no router to train in turns: set num_experts >= 2 in '
                'its MoEBackbone, or train it with a plain optim_wrapper=dict(optimizer=...) and '
                'no AlternatingOptimHook'
            )
        wrappers = {}
        for name in GROUPS:
            if not any(parameter.requires_grad for _, parameter in groups[name]):
                raise ValueError(
                    f'optim_wrapper.{name}: all parameters of the {name} are frozen, so there is '
                    'nothing to train in its turns'
                )
            with _only(model, groups[name]):
                wrappers[name] = build_optim_wrapper(model, self.optim_wrapper_cfg[name])
        _check_cover(model, wrappers)
        return AlternatingOptimWrapper(**wrappers)


@contextmanager
def _only(model: nn.Module, named: NamedParameters) -> Iterator[None]:
    """Show a model as if it had the given parameters alone.

    Inner constructors thus see the real modules under their full names, and an optimizer
    never holds, splits among processes or logs what belongs to the other group.
    """
    shown = {id(parameter) for _, parameter in named}
    tables = [(module, module._parameters) for module in model.modules()]
    try:
        for module, table in tables:
            module._parameters = {n: p for n, p in table.items() if p is None or id(p) in shown}
        yield
    finally:
        for module, table in tables:
            module._parameters = table


def _check_cover(model: nn.Module, wrappers: dict[str, OptimWrapper]) -> None:
    """Raise unless each parameter that is trained lies in exactly one param group of one
    optimizer."""
    times: dict[int, int] = {}
    for optim_wrapper in wrappers.values():
        for param_group in optim_wrapper.optimizer.param_groups:
            for parameter in param_group['params']:
                times[id(parameter)] = times.get(id(parameter), 0) + 1
    for problem, wrong in (
        ('in no optimizer', lambda count: count == 0),
        ('in an optimizer more than once', lambda count: count > 1),
    ):
        names = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and wrong(times.get(id(parameter), 0))
        ]
        if names:
            shown = ', '.join(names[:3])
            raise ValueError(
                f'{len(names)} parameters are {problem} (first: {shown}); check '
                'optim_wrapper.experts.constructor and optim_wrapper.router.constructor'
            )
