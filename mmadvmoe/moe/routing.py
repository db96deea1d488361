"""The decision of a router for a batch, and how to act on it.

Dimension letters used in this package::

    B images    N experts    L routers of a network    T tokens of an image    C channels    H, W height, width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mmadvmoe.utils import choose

#: Which function of the router's logits carries the gradient through a hard choice.
GATES = ('softmax', 'logit')


class NonFiniteRouterError(FloatingPointError):
    """A router gives logits that are NaN or infinite; taking their largest would send every image to expert 0."""

    def __init__(self, router: str = 'router') -> None:
        super().__init__(
            f'the logits of the router {router!r} are not finite, so it decides nothing: its weights, or what it is '
            'given to read, are not finite. Look for the iteration at which they became so, and load a checkpoint from '
            'before'
        )
        self.router = router


class BaseRouting:
    """The decision of one router for one batch: all that its consumers read.

    Attributes:
        expert (Tensor): The chosen experts, int64 in [0, N).
        logits (Tensor, optional): The router's logits, (B, N) of images or (B, T, N) of tokens, without noise; None
            when the route was given and no router was asked.
        of_tokens (bool): Whether the decision is about single tokens rather than whole images.
        dropped (int): Choices that no expert computes. Defaults to 0.
        noise_std (float): Standard deviation of the noise that training adds to the logits. Defaults to 0.
        counts (tuple[int]): Choices that fell on each expert, dropped ones included: N numbers.
        load (Tensor): The same on the device, (N,) int64.
        num_experts (int): N.
        top_k (int): K, the experts of each image or token.
        decisions (Tensor): (B, T * K) int64, T = 1 for images: what was decided for each image; given to
            :meth:`MoEBackbone.forward_routed` beside those of the other routers, it is a route.
    """

    expert: Tensor
    logits: Tensor | None
    of_tokens: ClassVar[bool] = False
    dropped: int = 0
    noise_std: float = 0.0
    counts: tuple[int, ...]
    load: Tensor
    num_experts: int
    top_k: int
    decisions: Tensor

    @property
    def token_logits(self) -> Tensor:
        """The logits of each token, (B, T, N); T = 1 for a decision about images. Needs ``logits``."""
        return self.logits if self.of_tokens else self.logits.unsqueeze(1)

    @property
    def followed(self) -> Tensor:
        """Whether the router itself, without noise, chooses these experts, (B, T) bool. Needs ``logits``."""
        own = self.token_logits.detach().topk(self.top_k, dim=-1).indices.sort(-1).values
        return (own == self.decisions.view_as(own)).all(-1)

    def detach(self) -> BaseRouting:
        """Give the same decision without any gradient, for logs or for a further pass."""
        raise NotImplementedError

    def take(self, rows: Tensor) -> BaseRouting:
        """Give the decision for some of the images, ``rows`` (b,) int64."""
        raise NotImplementedError


#: Experts to take in place of the routers' choice: see :meth:`MoEBackbone.forward_routed`.
Route = Tensor | Sequence[BaseRouting]


@dataclass(frozen=True, eq=False)
class Routing(BaseRouting):
    """The decision of one router for the images of a batch.

    Sorting by expert happens once, here; expert layers then work on contiguous slices.

    Attributes:
        expert (Tensor): (B,), one for each image.
        order (Tensor): (B,) permutation that sorts the batch by expert, keeping the order of the images inside one
            expert.
        inverse (Tensor): (B,) permutation that undoes ``order``.
        gate (Tensor, optional): Straight-through factor of each image, (B,): exactly 1 in the forward pass, the
            gradient of the gate in the backward pass. None where no gradient is wanted.
    """

    expert: Tensor
    order: Tensor
    inverse: Tensor
    load: Tensor
    counts: tuple[int, ...]
    logits: Tensor | None = None
    gate: Tensor | None = None
    top_k: ClassVar[int] = 1

    @classmethod
    def decide(cls, logits: Tensor, gate: str | None = 'softmax') -> Routing:
        """Send each image to the expert with the largest logit.

        The gate is ``1 + s - stop_gradient(s)``: with ``gate='softmax'`` s is the softmax probability of the chosen
        expert, bounded in [1/N, 1] with a bounded gradient; with ``gate='logit'`` s is the raw logit, as in the
        AdvMoE reference code, unbounded in both (arXiv:2308.10110 and its public code).

        Args:
            logits (Tensor): (B, N).
            gate (str, optional): ``'softmax'``, ``'logit'`` or None for no gradient to the router.

        Raises:
            ValueError: ``logits`` is not (B, N), or ``gate`` is unknown.
            NonFiniteRouterError: A logit is NaN or infinite.
        """
        if logits.dim() != 2:
            raise ValueError(f'router logits must have shape (B, N), got {tuple(logits.shape)}')
        if gate is not None:
            choose(gate, GATES, 'gate')
        expert = logits.detach().argmax(dim=1)
        routing = cls.fixed(expert, logits.shape[1], logits)
        if gate is None or not logits.requires_grad:
            return routing
        precise = torch.promote_types(logits.dtype, torch.float32)
        scores = logits.softmax(dim=1, dtype=precise) if gate == 'softmax' else logits
        chosen = scores.gather(1, expert[:, None]).squeeze(1)
        return replace(routing, gate=1 + (chosen - chosen.detach()))

    @classmethod
    def fixed(cls, expert: Tensor, num_experts: int, logits: Tensor | None = None) -> Routing:
        """Route by a given choice instead of a router's, without a gate.

        Args:
            expert (Tensor): (B,) int64 in [0, ``num_experts``).
            num_experts (int): N.
            logits (Tensor, optional): (B, N) logits of the router that was overruled, to be carried along.

        Raises:
            ValueError: ``expert`` is not (B,) or names an expert that does not exist.
            NonFiniteRouterError: A logit is NaN or infinite.
        """
        if expert.dim() != 1:
            raise ValueError(f'a route must have shape (B,), got {tuple(expert.shape)}')
        # One transfer to the host: a batched count, from which bad indices and logits show as well.
        counted = expert.clamp(-1, num_experts) + 1
        if logits is not None:
            counted = counted.masked_fill(~logits.detach().isfinite().all(dim=1), 0)
        load = count(counted, num_experts + 2)
        below, *counts, above = load.tolist()
        if below and logits is not None and not logits.isfinite().all():
            raise NonFiniteRouterError()
        if below or above:
            raise ValueError(f'a route must name experts in [0, {num_experts}), got {sorted(set(expert.tolist()))}')
        order = torch.argsort(expert, stable=True)
        return cls(expert, order, inverse_of(order), load[1:-1], tuple(counts), logits)

    def again(self, logits: Tensor | None = None) -> Routing:
        """Route the images of a further pass likewise, without a gate; nothing is counted or sorted once more.

        The logits (B, N) of the router in that pass are carried along.
        """
        return replace(self, logits=logits, gate=None)

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.counts)

    @property
    def decisions(self) -> Tensor:
        """The expert of each image, (B, 1)."""
        return self.expert[:, None]

    @property
    def followed(self) -> Tensor:
        """As :attr:`BaseRouting.followed`, (B, 1)."""
        return (self.logits.argmax(dim=1) == self.expert)[:, None]

    @property
    def single(self) -> bool:
        """Whether one expert takes the whole batch, so that there is nothing to sort."""
        return max(self.counts) == len(self.expert)

    def sort(self, x: Tensor) -> Tensor:
        """Bring a (B, ...) tensor into the order of the experts."""
        return x if self.single else x.index_select(0, self.order)

    def unsort(self, x: Tensor) -> Tensor:
        """Bring a (B, ...) tensor from the order of the experts back into that of the batch."""
        return x if self.single else x.index_select(0, self.inverse)

    def detach(self) -> Routing:
        return replace(self, logits=None if self.logits is None else self.logits.detach(), gate=None)

    def take(self, rows: Tensor) -> Routing:
        """Give the decision for some of the images, ``rows`` (b,) int64; without a gate."""
        return Routing.fixed(self.expert[rows], self.num_experts, None if self.logits is None else self.logits[rows])


def count(values: Tensor, size: int) -> Tensor:
    """How often each of 0 to ``size`` - 1 occurs in ``values`` (S,) int64: (size,) int64.

    As ``torch.bincount``, which on a GPU makes the host wait.
    """
    return values.new_zeros(size).scatter_add_(0, values, torch.ones_like(values))


def inverse_of(order: Tensor, length: int | None = None) -> Tensor:
    """Where each item of ``order`` (S,) is in it: (length,) int64, 0 for items that it lacks; S long by default."""
    inverse = order.new_zeros(len(order) if length is None else length)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
