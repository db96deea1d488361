"""Algorithm 1 of AdvMoE: experts θ and router ψ learn in turns, each while the other is fixed.

arXiv:2308.10110, algorithm 1, as the parts of this package run it::

    for each iteration:
        turn = schedule.turn_at(iteration)                      # TurnSchedule: 'experts' or 'router'
        batch = next batch; batch['turn'] = turn                # AlternatingOptimHook.before_train_iter
        with train_only(model, turn):                           # AlternatingOptimHook: the other group is fixed
            attack the batch                                    # AdvDataPreprocessor: the attack of this turn
            loss of the turn on clean and adversarial images    # RobustClassifier.loss
            step the optimizer of the turn                      # AlternatingOptimWrapper.update_params
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmpretrain.registry import HOOKS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmadvmoe.moe import GROUPS, router_modules, split_parameters
from mmadvmoe.utils import bare_model

from .optim_wrapper import AlternatingOptimWrapper


@dataclass(frozen=True)
class TurnSchedule:
    """The order in which experts and router are updated: a function of the iteration number and nothing else.

    After ``router_first_iters`` iterations of the router only and ``warmup_iters`` of experts only, a cycle of
    ``k_experts`` updates of the experts and ``k_router`` updates of the router repeats. An update takes as many
    iterations as its group accumulates gradients over, so a turn never ends with half an update. With ``reuse_batch``,
    each iteration holds a step of the experts and, after the warm-up, a step of the router.

    Args:
        k_experts, k_router, warmup_iters, reuse_batch, reuse_attack, router_first_iters: See
            :class:`AlternatingOptimHook`.
        accumulative_counts (Mapping[str, int]): Iterations per update of each group. Defaults to 1 and 1.

    Raises:
        ValueError: A number is out of range, or the numbers do not fit each other.
    """

    k_experts: int = 1
    k_router: int = 1
    warmup_iters: int = 0
    reuse_batch: bool = False
    reuse_attack: bool = False
    router_first_iters: int = 0
    accumulative_counts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(GROUPS, 1))

    def __post_init__(self) -> None:
        least_router = 0 if self.router_first_iters else 1
        least_of = dict(k_experts=1, k_router=least_router, warmup_iters=0, router_first_iters=0)
        for key, least in least_of.items():
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f'AlternatingOptimHook: {key}={value!r}; it must be an integer of at least {least}')
        if self.reuse_attack and not self.reuse_batch:
            raise ValueError(
                'AlternatingOptimHook: reuse_attack=True is about a batch that both groups step on; set '
                'reuse_batch=True as well'
            )
        experts, router = (self.accumulative_counts[group] for group in GROUPS)
        if self.reuse_batch and self.k_experts != self.k_router:
            raise ValueError(
                f'AlternatingOptimHook: k_experts={self.k_experts} and k_router={self.k_router} with reuse_batch=True; '
                'both groups step on each batch, so the two must be equal'
            )
        if self.reuse_batch and experts != router:
            raise ValueError(
                f'optim_wrapper.experts.accumulative_counts={experts} and optim_wrapper.router.accumulative_counts='
                f'{router} with reuse_batch=True; both groups step on each batch, so they must be equal to give one '
                'update of the router for each of the experts'
            )
        for key, group, count in (('warmup_iters', 'experts', experts), ('router_first_iters', 'router', router)):
            if getattr(self, key) % count:
                raise ValueError(
                    f'AlternatingOptimHook: {key}={getattr(self, key)} ends in the middle of an update; it must be a '
                    f'multiple of optim_wrapper.{group}.accumulative_counts={count}'
                )

    @property
    def lengths(self) -> tuple[int, int]:
        """Iterations of a turn of the experts and of a turn of the router."""
        return self.k_experts * self.accumulative_counts['experts'], self.k_router * self.accumulative_counts['router']

    def turn_at(self, iteration: int) -> str:
        """The group that steps in an iteration (counted from 0), the first one with ``reuse_batch``."""
        if iteration < self.router_first_iters:
            return 'router'
        after = iteration - self.router_first_iters - self.warmup_iters
        if self.reuse_batch or after < 0:
            return 'experts'
        experts, router = self.lengths
        return 'experts' if after % (experts + router) < experts else 'router'

    def repeats_batch(self, iteration: int) -> bool:
        """Whether a step of the router follows on the batch of this iteration."""
        return self.reuse_batch and iteration >= self.router_first_iters + self.warmup_iters

    def count_before(self, group: str, iteration: int) -> int:
        """Backward passes of ``'experts'`` or ``'router'`` that lie before an iteration (counted from 0)."""
        first = min(iteration, self.router_first_iters)
        iteration -= first
        after = max(iteration - self.warmup_iters, 0)
        if self.reuse_batch:
            return iteration if group == 'experts' else first + after
        experts, router = self.lengths
        cycles, rest = divmod(after, experts + router)
        if group == 'router':
            return first + cycles * router + max(rest - experts, 0)
        return iteration - after + cycles * experts + min(rest, experts)


@contextmanager
def train_only(model: nn.Module, group: str, in_eval: bool = True) -> Iterator[None]:
    """Fix the group that is not to be trained; on exit every flag is as it was.

    Its parameters require no gradient and its modules are in eval mode, so neither weights nor norm statistics move.

    Args:
        model (nn.Module): The bare model.
        group (str): The group that is trained, ``'experts'`` or ``'router'``.
        in_eval (bool): Whether the modules of the other group go into eval mode. Defaults to True.
    """
    below_routers = {id(module) for router in router_modules(model) for module in router.modules()}
    modules = [m for m in model.modules() if m.training and (id(m) in below_routers) != (group == 'router')]
    modules = modules if in_eval else []
    (other,) = (name for name in GROUPS if name != group)
    parameters = [parameter for _, parameter in split_parameters(model)[other] if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        # Past `train()` of backbones, which would set flags that the user has set otherwise.
        for module in modules:
            module.training = False
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for module in modules:
            module.training = True


@HOOKS.register_module()
class AlternatingOptimHook(Hook):
    """Train the experts θ and the router ψ in turns.

    The turn is part of the batch: ``data_batch['turn']`` is ``'experts'`` or ``'router'``, and what depends on it reads
    it there. It follows from the iteration number alone, so resuming needs no state. The group whose turn it is not is
    fixed inside the step alone, by the contexts of the optimizer wrapper (see :func:`train_only`): hooks find the model
    as it is, and so does whoever catches an error.

    Values in the log get the name of their turn: ``experts/loss``, ``router/loss``.

    Args:
        k_experts (int): Updates of the experts in one cycle. Defaults to 1.
        k_router (int): Updates of the router in one cycle; with ``router_first_iters`` it may be 0, and the router is
            frozen after them. Defaults to 1.
        warmup_iters (int): Iterations at the start that belong to the experts alone. Defaults to 0.
        reuse_batch (bool): Whether the router steps on the batch that the experts have just stepped on, attacked
            afresh, instead of waiting for its own. What ``data_preprocessor.augment`` draws is drawn afresh, too.
            Defaults to False.
        fixed_in_eval (bool): Whether the modules of the group that is fixed are in eval mode. Without, its norm layers
            go on normalising by the batch and counting, as in the reference code, so that what is fixed are its
            weights alone. Defaults to True.
        reuse_attack (bool): With ``reuse_batch``, whether the router steps on the very images that the experts have
            stepped on, adversarial ones included, which saves its attack. Defaults to False.
        router_first_iters (int): Iterations before all others that belong to the router alone, whose ``router_loss``
            must then need no trained experts, as :class:`~mmadvmoe.models.ClassGroupLoss`. Defaults to 0.

    Raises:
        ValueError: A number is out of range or they do not fit each other, see :class:`TurnSchedule`.

    Examples:
        The schedule of the paper (arXiv:2308.10110, algorithm 1), a new batch for each turn:

        >>> custom_hooks = [dict(type='AlternatingOptimHook', k_experts=1, k_router=1)]

        That of its public code, both turns on each batch:

        >>> custom_hooks = [dict(type='AlternatingOptimHook', reuse_batch=True)]

        The same at half the price, one attack for both turns:

        >>> custom_hooks = [dict(type='AlternatingOptimHook', reuse_batch=True, reuse_attack=True)]

        The router first, then frozen, for routers that learn groups of classes:

        >>> custom_hooks = [dict(type='AlternatingOptimHook', router_first_iters=1000, k_router=0)]

        Each needs an optimizer for each group, see :class:`AlternatingOptimWrapperConstructor`.
    """

    # Before RuntimeInfoHook, which puts the outputs of an iteration into the log.
    priority = 'HIGHEST'

    def __init__(
        self,
        k_experts: int = 1,
        k_router: int = 1,
        warmup_iters: int = 0,
        reuse_batch: bool = False,
        fixed_in_eval: bool = True,
        reuse_attack: bool = False,
        router_first_iters: int = 0,
    ) -> None:
        self.fixed_in_eval = fixed_in_eval
        self.schedule = TurnSchedule(
            k_experts, k_router, warmup_iters, reuse_batch, reuse_attack, router_first_iters=router_first_iters
        )
        self._batch: dict | None = None

    def before_run(self, runner: Runner) -> None:
        """Check that the runner can train in turns, and hand the schedule to its optimizers.

        Raises:
            TypeError: ``optim_wrapper`` is not built for turns.
            ValueError: The router never gets a turn, an attack never runs, or the model wrapper cannot leave parameters
                out.
        """
        optim_wrapper = runner.optim_wrapper
        if not isinstance(optim_wrapper, OptimWrapper):
            return  # not built: a run of validation or test
        if not isinstance(optim_wrapper, AlternatingOptimWrapper):
            raise TypeError(
                f'AlternatingOptimHook cannot work with a {type(optim_wrapper).__name__}; set '
                "optim_wrapper.constructor='AlternatingOptimWrapperConstructor'"
            )
        model = runner.model
        if isinstance(model, DistributedDataParallel) and not (
            model.find_unused_parameters or hasattr(model, 'of_turn')
        ):
            raise ValueError(
                'find_unused_parameters=False: distributed training in turns leaves one group out of each step; set '
                "model_wrapper_cfg=dict(type='TurnsDistributedDataParallel') or find_unused_parameters=True"
            )
        preprocessor = bare_model(model).data_preprocessor
        attack, of_router = (getattr(preprocessor, key, None) for key in ('attack_cfg', 'router_attack_cfg'))
        if self.schedule.reuse_attack and of_router not in (None, attack) and not self.schedule.router_first_iters:
            raise ValueError(
                'AlternatingOptimHook: with reuse_attack=True the router steps on the images of '
                'model.data_preprocessor.attack, so that router_attack beside it never runs: set it to None'
            )
        self.schedule = replace(self.schedule, accumulative_counts=optim_wrapper.accumulative_counts)
        if not self.schedule.count_before('experts', runner.max_iters):
            raise ValueError(
                f'AlternatingOptimHook: router_first_iters={self.schedule.router_first_iters} leaves no turn for the '
                f'experts in the {runner.max_iters} iterations of the training'
            )
        if not self.schedule.count_before('router', runner.max_iters):
            raise ValueError(
                f'AlternatingOptimHook: warmup_iters={self.schedule.warmup_iters} and '
                f'k_experts={self.schedule.k_experts} leave no turn for the router in the {runner.max_iters} '
                'iterations of the training'
            )
        optim_wrapper.count_before = self.schedule.count_before
        optim_wrapper.fixing = partial(self._fixing, bare_model(model))

    @contextmanager
    def _fixing(self, model: nn.Module, turn: str) -> Iterator[None]:
        """Around forward pass and update of a turn."""
        keeps = self.schedule.reuse_attack and turn == 'experts'
        keeping = model.data_preprocessor.register_forward_hook(self._keep_attacked) if keeps else nullcontext()
        with keeping, train_only(model, turn, self.fixed_in_eval):
            yield

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Give the step to the group that this iteration belongs to."""
        if self.schedule.repeats_batch(runner.iter) and not self.schedule.reuse_attack:
            # Batch augmentations write mixed labels into the samples: the router gets them as they came.
            augments = getattr(bare_model(runner.model).data_preprocessor, 'batch_augments', 'unknown')
            self._batch = dict(data_batch) if augments is None else copy.deepcopy(data_batch)
        turn = self.schedule.turn_at(runner.iter)
        data_batch['turn'] = turn
        runner.optim_wrapper.activate(turn)

    def _keep_attacked(self, preprocessor: nn.Module, args: tuple, batch: dict) -> None:
        if 'adv_inputs' not in batch:
            raise ValueError(
                'AlternatingOptimHook: reuse_attack=True needs clean and adversarial images: set data_preprocessor='
                "dict(type='AdvDataPreprocessor', mode='pair', attack=...)"
            )
        self._batch = batch

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Name the outputs by turn, and let the router step too if it shares the batch."""
        log_vars = _named_by_turn(outputs, data_batch['turn'])
        batch, self._batch = self._batch, None
        if self.schedule.repeats_batch(runner.iter):
            runner.optim_wrapper.activate('router')
            router_outputs = runner.model.train_step(dict(batch, turn='router'), optim_wrapper=runner.optim_wrapper)
            log_vars.update(_named_by_turn(router_outputs, 'router'))
        # In place, as the hooks that follow share this dict.
        outputs.clear()
        outputs.update(log_vars)


def _named_by_turn(outputs: Mapping[str, Any], turn: str) -> dict[str, Any]:
    """The outputs under the name of their turn, numbers as those of Python: MMEngine would fetch each by itself."""
    named = {f'{turn}/{name}': value for name, value in outputs.items()}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.numel() == 1}
    if tensors:
        values = torch.stack([value.detach().double().view(()) for value in tensors.values()])
        named.update(zip(tensors, values.tolist()))
    return named
