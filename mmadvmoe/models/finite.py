"""Stop training on numbers that are not finite, before they reach the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional, Union

import torch
from mmengine.logging import MessageHub
from torch import Tensor

from mmadvmoe.moe import Routing


class NonFiniteError(FloatingPointError):
    """A loss, a router logit or a gradient is NaN or infinite; ``what`` names the values."""

    def __init__(self, what: str) -> None:
        iteration = MessageHub.get_current_instance().get_info('iter')
        where = '' if iteration is None else f' at iteration {iteration + 1}'
        super().__init__(
            f'not finite{where}: {what}. Training was stopped before the weights were touched. Try a smaller learning '
            'rate of the group concerned (optim_wrapper.router.optimizer.lr), gradient clipping '
            '(optim_wrapper.router.clip_grad=dict(max_norm=...)), or gate="softmax" in MoEBackbone'
        )


def check_finite(
    losses: Mapping[str, Union[Tensor, Sequence[Tensor]]], routings: Sequence[Routing] = (), turn: Optional[str] = None
) -> None:
    """Raise if a loss term or a router logit is NaN or infinite, at the cost of one transfer from the device.

    Args:
        losses (Mapping[str, Tensor | Sequence[Tensor]]): Named loss terms, as a ``loss()`` returns them.
        routings (Sequence[Routing]): What the routers decided; those without logits are skipped.
        turn (str, optional): Whose turn it is, for the message.

    Raises:
        NonFiniteError: Naming the iteration and all values concerned.
    """
    terms = ((name, [term] if isinstance(term, Tensor) else term) for name, term in losses.items())
    values = [(name, value) for name, term in terms for value in term]
    values += [('router logits', routing.logits) for routing in routings if routing.logits is not None]
    finite = torch.stack([value.detach().isfinite().all() for _, value in values]).tolist() if values else []
    wrong = [name for (name, _), is_finite in zip(values, finite) if not is_finite]
    if wrong:
        where = '' if turn is None else f' in a turn of the {turn}'
        raise NonFiniteError(', '.join(dict.fromkeys(wrong)) + where)
