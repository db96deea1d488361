"""Two optimizers that take turns."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Optional

from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn

from mmadvmoe.moe import GROUPS
from mmadvmoe.utils import choose

if TYPE_CHECKING:
    from .alternation import TurnSchedule


class AlternatingOptimWrapper(OptimWrapperDict):
    """The optimizers of the experts θ and of the router ψ, of which one is active.

    All that a ``train_step`` of MMEngine calls (``optim_context``, ``update_params`` and what they
    use) acts on the active one, so that models and model wrappers train in turns without knowing
    it. Learning rates and gradient norms are logged under the name of their group: ``experts.lr``,
    ``router.grad_norm``.

    Built by :class:`AlternatingOptimWrapperConstructor`; :class:`AlternatingOptimHook` decides
    whose turn it is.

    Args:
        experts (OptimWrapper): Holds θ, every parameter that is not below a router.
        router (OptimWrapper): Holds ψ.

    Attributes:
        schedule (TurnSchedule, optional): Set by :class:`AlternatingOptimHook` before training.
    """

    def __init__(self, *, experts: OptimWrapper, router: OptimWrapper) -> None:
        super().__init__(experts=experts, router=router)
        self.schedule: Optional[TurnSchedule] = None
        self._active_name = 'experts'
        for name, optim_wrapper in self.items():
            if optim_wrapper.clip_grad_kwargs:
                # MMEngine logs the norm as `train/{grad_name}`, where one group would overwrite the
                # other.
                optim_wrapper.grad_name = f'{name}.{optim_wrapper.grad_name}'

    @property
    def active_name(self) -> str:
        """``'experts'`` or ``'router'``."""
        return self._active_name

    @property
    def active(self) -> OptimWrapper:
        """The optimizer wrapper whose turn it is."""
        return self.optim_wrappers[self._active_name]

    @property
    def accumulative_counts(self) -> dict[str, int]:
        """Iterations per update of each group."""
        return {name: wrapper._accumulative_counts for name, wrapper in self.items()}

    def activate(self, name: str) -> None:
        """Give the turn to a group.

        Gradients that are not part of an update under way are dropped, those of both groups:
            nothing that was left
        on a parameter while its group was fixed reaches its next update.

        Raises:
            ValueError: ``name`` is no group.
        """
        self._active_name = choose(name, GROUPS, 'parameter group')
        for optim_wrapper in self.values():
            if optim_wrapper.inner_count % optim_wrapper._accumulative_counts == 0:
                optim_wrapper.zero_grad()

    def update_params(
        self,
        loss: Tensor,
        step_kwargs: Optional[dict] = None,
        zero_kwargs: Optional[dict] = None,
    ) -> None:
        """Update the active group, see :meth:`mmengine.optim.OptimWrapper.update_params`."""
        self.active.update_params(loss, step_kwargs=step_kwargs, zero_kwargs=zero_kwargs)

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Back-propagate with the loss scaling of the active group."""
        self.active.backward(loss, **kwargs)

    def step(self, **kwargs) -> None:
        """Step the optimizer of the active group."""
        self.active.step(**kwargs)

    def zero_grad(self, **kwargs) -> None:
        """Drop the gradients of the active group."""
        self.active.zero_grad(**kwargs)

    def optim_context(self, model: nn.Module) -> AbstractContextManager:
        """The context of the active group: mixed precision, and no synchronisation while it
        accumulates."""
        return self.active.optim_context(model)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Divide the loss by what the active group accumulates over."""
        return self.active.scale_loss(loss)

    def should_update(self) -> bool:
        """Whether the active group updates its parameters after this backward pass."""
        return self.active.should_update()

    def should_sync(self) -> bool:
        """Whether gradients are synchronised between processes in the coming backward pass."""
        return self.active.should_sync()

    @property
    def inner_count(self) -> int:
        """Backward passes of the active group so far."""
        return self.active.inner_count

    def initialize_count_status(self, model: nn.Module, cur_iter: int, max_iters: int) -> None:
        """Tell each group how many of the iterations before ``cur_iter`` and ``max_iters`` are its
        own.

        Raises:
            RuntimeError: There is no schedule of turns to tell them apart.
        """
        if self.schedule is None:
            raise RuntimeError(
                'AlternatingOptimWrapper has no schedule of turns: add '
                'dict(type="AlternatingOptimHook") to custom_hooks'
            )
        for name, optim_wrapper in self.items():
            optim_wrapper.initialize_count_status(
                model,
                self.schedule.count_before(name, cur_iter),
                self.schedule.count_before(name, max_iters),
            )

    def load_state_dict(self, state_dict: dict) -> None:
        """Load the state of both optimizers.

        Raises:
            ValueError: The state does not hold exactly the two groups.
        """
        if set(state_dict) != set(GROUPS):
            raise ValueError(
                f'the optimizer state of the checkpoint holds {sorted(state_dict)} instead of '
                f'{list(GROUPS)}: it was not written by training in turns; to start from its '
                'weights, use load_from without resume'
            )
        super().load_state_dict(state_dict)
