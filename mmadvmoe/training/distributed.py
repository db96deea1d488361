"""Distributed training in turns, with no more exchanged than the turn has learnt."""

from __future__ import annotations

from typing import Any

from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import Tensor, nn

from mmadvmoe.moe import GROUPS

from .alternation import train_only


@MODEL_WRAPPERS.register_module()
class TurnsDistributedDataParallel(MMDistributedDataParallel):
    """MMEngine's wrapper with a reducer for each group: experts θ and router ψ.

    A single reducer that leaves out the group whose turn it is not has to look for it in the graph of every step
    (``find_unused_parameters``), and exchanges zeros for it. Here a turn exchanges the gradients of its own group and
    no others. Gradients are the same.

    Every parameter of a group has to be part of the loss of its turn.

    Args:
        module (nn.Module): The model.
        device_ids (list[int], optional): As in PyTorch; ignored for a model on the CPU.
        broadcast_buffers (bool): As in PyTorch. Defaults to False.
        **kwargs: Of :class:`torch.nn.parallel.DistributedDataParallel`.

    Examples:
        >>> model_wrapper_cfg = dict(type='TurnsDistributedDataParallel')
    """

    def __init__(
        self, module: nn.Module, device_ids: list | None = None, broadcast_buffers: bool = False, **kwargs: Any
    ) -> None:
        if next(module.parameters()).device.type == 'cpu':
            device_ids = None
        kwargs.update(device_ids=device_ids, broadcast_buffers=broadcast_buffers)
        experts, router = GROUPS
        # A reducer takes the parameters that require a gradient when it is made.
        with train_only(module, experts):
            super().__init__(module, **kwargs)
        with train_only(module, router):
            of_router = MMDistributedDataParallel(module, **kwargs)
        # No submodule: it has the same parameters.
        object.__setattr__(self, '_of_router', of_router)

    def of_turn(self, turn: str) -> MMDistributedDataParallel:
        """The wrapper that reduces the gradients of ``'experts'`` or ``'router'``."""
        return self._of_router if turn == 'router' else self

    def train_step(self, data: dict, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Step in the turn that the batch names.

        Raises:
            ValueError: It names none, as without :class:`AlternatingOptimHook`.
        """
        if data.get('turn') not in GROUPS:
            raise ValueError(
                f'model_wrapper_cfg.type={type(self).__name__} is for training in turns: add '
                "dict(type='AlternatingOptimHook') to custom_hooks, or use MMDistributedDataParallel"
            )
        return MMDistributedDataParallel.train_step(self.of_turn(data['turn']), data, optim_wrapper)
