"""Gives the turn to experts and router by the iteration number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from mmpretrain.registry import HOOKS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmadvmoe.moe import router_modules, split_parameters
from mmadvmoe.utils import bare_model

from .optim_wrapper import AlternatingOptimWrapper
from .turns import TurnSchedule


@HOOKS.register_module()
class AlternatingOptimHook(Hook):
    """Trains the experts θ and the router ψ in turns.

    The group whose turn it is not is fixed. Its parameters require no gradient and its modules are
    in eval mode, so neither its weights nor its norm statistics move. Parameters that were frozen
    before training stay frozen. The turn follows from the iteration number alone, so resuming needs
    no state.

    Values in the log get the name of their turn: ``experts/loss``, ``router/loss``.

    Args:
        k_experts (int): Updates of the experts in one cycle. Defaults to 1.
        k_router (int): Updates of the router in one cycle. Defaults to 1.
        warmup_iters (int): Iterations at the start that belong to the experts alone. Defaults to 0.
        reuse_batch (bool): Whether the router steps on the batch that the experts have just stepped
            on, attacked afresh, instead of waiting for its own. Defaults to False.

    Raises:
        ValueError: A number is out of range or they do not fit each other, see
            :class:`TurnSchedule`.

    Examples:
        The schedule of the paper (arXiv:2308.10110, algorithm 1), a new batch for each turn:

        >>> custom_hooks = [dict(type='AlternatingOptimHook', k_experts=1, k_router=1)]

        That of its public code, both turns on each batch:

        >>> custom_hooks = [dict(type='AlternatingOptimHook', reuse_batch=True)]

        Either needs an optimizer for each group:

        >>> optim_wrapper = dict(
        ...     constructor='AlternatingOptimWrapperConstructor',
        ...     experts=dict(optimizer=dict(type='SGD', lr=0.1)),
        ...     router=dict(optimizer=dict(type='SGD', lr=0.01)))
    """

    # Before RuntimeInfoHook, which puts the outputs of an iteration into the log.
    priority = 'HIGHEST'

    def __init__(
        self,
        k_experts: int = 1,
        k_router: int = 1,
        warmup_iters: int = 0,
        reuse_batch: bool = False,
    ) -> None:
        self.schedule = TurnSchedule(k_experts, k_router, warmup_iters, reuse_batch)
        self._trainable: dict[str, list[nn.Parameter]] = {}
        self._batch: Any = None

    def before_run(self, runner: Runner) -> None:
        """Check that the runner can train in turns, and hand the schedule to its optimizers.

        Raises:
            TypeError: ``optim_wrapper`` is not built for turns.
            ValueError: The router never gets a turn, or the model wrapper cannot leave parameters
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
        if isinstance(runner.model, DistributedDataParallel) and not runner.model.find_unused_parameters:
            raise ValueError(
                'find_unused_parameters=False: distributed training in turns leaves one group out '
                'of each step; set find_unused_parameters=True in the config (or in its '
                'model_wrapper_cfg)'
            )
        self.schedule = replace(self.schedule, accumulative_counts=optim_wrapper.accumulative_counts)
        if not self.schedule.count_before('router', runner.max_iters):
            raise ValueError(
                f'AlternatingOptimHook: warmup_iters={self.schedule.warmup_iters} and '
                f'k_experts={self.schedule.k_experts} leave no turn for the router in the '
                f'{runner.max_iters} iterations of the training'
            )
        optim_wrapper.schedule = self.schedule

    def before_train(self, runner: Runner) -> None:
        """Note which parameters are to be trained at all."""
        # Some backbones freeze their stages in `train()` only.
        runner.model.train()
        self._trainable = {
            group: [parameter for _, parameter in named if parameter.requires_grad]
            for group, named in split_parameters(bare_model(runner.model)).items()
        }

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Give the turn to the group that this iteration belongs to."""
        self._take_turn(runner, self.schedule.turn_at(runner.iter))
        if self.schedule.repeats_batch(runner.iter):
            # Batch augmentations write mixed labels into the samples: the router gets them as they
            # came.
            self._batch = _copy_batch(data_batch)

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[dict] = None,
    ) -> None:
        """Name the outputs by turn, after a turn of the router if it shares the batch."""
        log_vars = _named_by_turn(outputs, runner.optim_wrapper.active_name)
        if self.schedule.repeats_batch(runner.iter):
            batch, self._batch = self._batch, None
            self._take_turn(runner, 'router')
            router_outputs = runner.model.train_step(batch, optim_wrapper=runner.optim_wrapper)
            log_vars.update(_named_by_turn(router_outputs, 'router'))
        # In place, as the hooks that follow share this dict.
        outputs.clear()
        outputs.update(log_vars)

    def after_train(self, runner: Runner) -> None:
        """Leave the model as a plain one: no turn, nothing fixed."""
        for parameters in self._trainable.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        runner.model.train()
        _set_turn(runner.model, None)

    def _take_turn(self, runner: Runner, turn: str) -> None:
        runner.optim_wrapper.activate(turn)
        for group, parameters in self._trainable.items():
            for parameter in parameters:
                parameter.requires_grad_(group == turn)
        # From the whole to the part, so that backbones apply their own rules (`norm_eval`) first.
        # `train()` of a backbone may return None: do not chain.
        runner.model.train(turn == 'experts')
        for router in router_modules(runner.model):
            router.train(turn == 'router')
        _set_turn(runner.model, turn)


def _set_turn(model: nn.Module, turn: Optional[str]) -> None:
    """Tell a model with an objective for each turn, such as :class:`RobustClassifier`."""
    model = bare_model(model)
    if hasattr(model, 'turn'):
        model.turn = turn


def _named_by_turn(outputs: Mapping[str, Any], turn: str) -> dict[str, Any]:
    prefix = f'{turn}/'
    named = ((k if k.startswith(prefix) else prefix + k, v) for k, v in outputs.items())
    return dict(named)


def _copy_batch(batch: Any) -> Any:
    """Copy a batch, deep enough that no change of the original reaches the copy."""
    if isinstance(batch, (Tensor, BaseDataElement)):
        return batch.clone()
    if isinstance(batch, Mapping):
        return {key: _copy_batch(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, '_fields'):
        return type(batch)(*(_copy_batch(value) for value in batch))
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        return type(batch)(_copy_batch(value) for value in batch)
    return batch
