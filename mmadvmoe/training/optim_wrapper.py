"""Two optimizers that take turns, one for the experts and one for the router; and mixed precision on CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmpretrain.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import Tensor, nn

from mmadvmoe.moe import GROUPS, split_parameters
from mmadvmoe.runtime.config_checks import check_groups
from mmadvmoe.utils import bare_model, choose


class AlternatingOptimWrapper(OptimWrapperDict):
    """The optimizers of the experts θ and of the router ψ, of which one is active.

    What a ``train_step`` of MMEngine calls (``optim_context`` and ``update_params``) acts on the :attr:`active` one, so
    models and model wrappers train in turns without knowing it. Learning rates and gradient norms are logged under the
    name of their group: ``experts.lr``, ``router.grad_norm``. Built by
    :class:`AlternatingOptimWrapperConstructor`.

    Args:
        experts (OptimWrapper): Holds θ, every parameter that is not below a router.
        router (OptimWrapper): Holds ψ.

    Attributes:
        active_name (str): The group whose turn it is, ``'experts'`` or ``'router'``.
        count_before (Callable, optional): Gives the backward passes of a group (str) before an iteration (int). Set
            by ``AlternatingOptimHook`` before training.
        fixing (Callable): Gives the context in which the other group than the one named is fixed, entered around the
            forward pass and around the update. Does nothing until ``AlternatingOptimHook`` sets it before training.
    """

    def __init__(self, *, experts: OptimWrapper, router: OptimWrapper) -> None:
        super().__init__(experts=experts, router=router)
        self.count_before: Callable[[str, int], int] | None = None
        self.fixing: Callable[[str], AbstractContextManager] = nullcontext
        self.active_name = 'experts'
        for name, optim_wrapper in self.items():
            if optim_wrapper.clip_grad_kwargs:
                # MMEngine logs the norm as `train/{grad_name}`, where one group would overwrite the other.
                optim_wrapper.grad_name = f'{name}.{optim_wrapper.grad_name}'

    @property
    def active(self) -> OptimWrapper:
        """The optimizer wrapper whose turn it is."""
        return self.optim_wrappers[self.active_name]

    @property
    def accumulative_counts(self) -> dict[str, int]:
        """Iterations per update of each group."""
        return {name: wrapper._accumulative_counts for name, wrapper in self.items()}

    def activate(self, name: str) -> None:
        """Give the turn to a group.

        Gradients of either group that are not part of an update under way are dropped, so that nothing left on a
        parameter while its group was fixed reaches its next update.

        Raises:
            ValueError: ``name`` is no group.
        """
        self.active_name = choose(name, GROUPS, 'parameter group')
        for optim_wrapper in self.values():
            if optim_wrapper.inner_count % optim_wrapper._accumulative_counts == 0:
                optim_wrapper.zero_grad()

    def zero_grad(self, **kwargs: Any) -> None:
        """Clear the gradients of the active group; the other may be in the midst of an update."""
        self.active.zero_grad(**kwargs)

    def update_params(self, loss: Tensor, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        """Update the active group, see :meth:`mmengine.optim.OptimWrapper.update_params`."""
        with self.fixing(self.active_name):  # as backward passes may run parts of the model again
            self.active.update_params(loss, step_kwargs=step_kwargs, zero_kwargs=zero_kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The other group fixed, and the context of the active one: mixed precision, no synchronisation."""
        with self.fixing(self.active_name), self.active.optim_context(model):
            yield

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        """Tell each group how many of the iterations before ``cur_iter`` and ``max_iters`` are its own.

        Raises:
            RuntimeError: There is no schedule of turns to tell them apart.
        """
        if self.count_before is None:
            raise RuntimeError(
                'AlternatingOptimWrapper has no schedule of turns: add dict(type="AlternatingOptimHook") to '
                'custom_hooks'
            )
        for name, optim_wrapper in self.items():
            counts = (self.count_before(name, iteration) for iteration in (cur_iter, max_iters))
            optim_wrapper.initialize_count_status(model, *counts)

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of both optimizers.

        Raises:
            ValueError: The state does not hold exactly the two groups.
        """
        if set(state_dict) != set(GROUPS):
            raise ValueError(
                f'the optimizer state of the checkpoint holds {sorted(state_dict)} instead of {list(GROUPS)}: it was '
                'not written by training in turns; to start from its weights, use load_from without resume'
            )
        super().load_state_dict(state_dict)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class AlternatingOptimWrapperConstructor:
    """Give every parameter to exactly one of two optimizers, experts θ or router ψ.

    Each group takes what ``optim_wrapper`` takes in any MMPretrain config, with its own ``type``, ``constructor``,
    ``paramwise_cfg``, ``clip_grad`` and ``accumulative_counts``. Names in ``custom_keys`` are the full names of the
    parameters.

    Args:
        optim_wrapper_cfg (dict): ``experts`` and ``router``, each the config of an optimizer wrapper.
        paramwise_cfg (dict, optional): Not served here; it belongs inside the groups.

    Raises:
        ValueError: A group or its optimizer is missing, or a key is not a group.
        TypeError: A group is not a dict.

    Examples:
        >>> optim_wrapper = dict(
        ...     constructor='AlternatingOptimWrapperConstructor',
        ...     experts=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9), paramwise_cfg=dict(norm_decay_mult=0.)),
        ...     router=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9), clip_grad=dict(max_norm=1.)))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if paramwise_cfg is not None:
            raise ValueError(
                'optim_wrapper.paramwise_cfg is not served by AlternatingOptimWrapperConstructor; set '
                'optim_wrapper.experts.paramwise_cfg and optim_wrapper.router.paramwise_cfg'
            )
        check_groups('optim_wrapper', optim_wrapper_cfg)
        for name in GROUPS:
            group = optim_wrapper_cfg[name]
            if not isinstance(group, dict):
                raise TypeError(f'optim_wrapper.{name} must be the config (dict) of an OptimWrapper, got {group!r}')
            if 'optimizer' not in group:
                raise ValueError(
                    f"optim_wrapper.{name} has no 'optimizer'; give it one, such as optimizer=dict(type='SGD', lr=0.1)"
                )
        self.optim_wrapper_cfg = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> AlternatingOptimWrapper:
        """Build both optimizer wrappers for a model, which may be wrapped for distributed training.

        Raises:
            ValueError: The model has no router, a group has nothing to train, or a parameter was left out by, or given
                twice to, the constructors of the groups.
        """
        model = bare_model(model)
        groups = split_parameters(model)
        if not groups['router']:
            raise ValueError(
                f'{type(model).__name__} has no router to train in turns: set num_experts >= 2 in its MoEBackbone, or '
                'train it with a plain optim_wrapper=dict(optimizer=...) and no AlternatingOptimHook'
            )
        wrappers = {}
        for name in GROUPS:
            if not any(parameter.requires_grad for _, parameter in groups[name]):
                raise ValueError(f'optim_wrapper.{name}: all parameters of the {name} are frozen: nothing to train')
            with _only(model, groups[name]):
                wrappers[name] = build_optim_wrapper(model, self.optim_wrapper_cfg[name])
        _check_cover(model, wrappers)
        return AlternatingOptimWrapper(**wrappers)


@contextmanager
def _only(model: nn.Module, named: list[tuple[str, nn.Parameter]]) -> Iterator[None]:
    """Show a model as if it had the given parameters alone.

    Inner constructors thus see the real modules under their full names, and an optimizer never holds, splits among
    processes or logs what belongs to the other group.
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
    """Raise unless each parameter that is trained lies in exactly one param group of one optimizer."""
    param_groups = [group for wrapper in wrappers.values() for group in wrapper.optimizer.param_groups]
    given = Counter(id(parameter) for group in param_groups for parameter in group['params'])
    times = {name: given[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    for problem, names in (
        ('in no optimizer', [name for name, count in times.items() if count == 0]),
        ('in an optimizer more than once', [name for name, count in times.items() if count > 1]),
    ):
        if names:
            raise ValueError(
                f'{len(names)} parameters are {problem} (first: {", ".join(names[:3])}); check '
                'optim_wrapper.experts.constructor and optim_wrapper.router.constructor'
            )


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Run forward passes in bfloat16 on CPU, which MMEngine's ``AmpOptimWrapper`` refuses; weights stay float32.

    bfloat16 has the exponent range of float32, so no loss scaling is needed.

    Args:
        dtype (str): ``'bfloat16'``, the only type on offer. Defaults to that.
        **kwargs: As for :class:`mmengine.optim.OptimWrapper`.

    Raises:
        ValueError: Another ``dtype``.
    """

    def __init__(self, dtype: str = 'bfloat16', **kwargs) -> None:
        if dtype != 'bfloat16':
            raise ValueError(
                f"CPUAmpOptimWrapper: dtype={dtype!r}; allowed: 'bfloat16' (float16 would need loss scaling)"
            )
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast on CPU, inside MMEngine's context for gradient accumulation."""
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield
