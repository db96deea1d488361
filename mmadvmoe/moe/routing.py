"""What a router decided for a batch, and how to act on it.

Dimension letters used in this package::

    B images    N experts    L routers of a network    T tokens of an image    C channels    H, W height, width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional, Union

import torch
from torch import Tensor

from .token_routing import TokenRouting

#: Which function of the router's logits carries the gradient through a hard choice.
GATES = ('softmax', 'logit')


@dataclass(frozen=True, eq=False)
class Routing:
    """The decision of one router for one batch.

    Sorting by expert happens once, here; expert layers then work on contiguous slices.

    Attributes:
        expert (Tensor): The chosen expert of each image, (B,) int64 in [0, N).
        order (Tensor): (B,) permutation that sorts the batch by expert, keeping the order of the images inside one
            expert.
        inverse (Tensor): (B,) permutation that undoes ``order``.
        counts (tuple[int]): Images of each expert; N numbers that sum to B.
        logits (Tensor, optional): The router's logits, (B, N); None when the route was given and no router was asked.
        gate (Tensor, optional): Straight-through factor of each image, (B,): exactly 1 in the forward pass, the
            gradient of the gate in the backward pass. None where no gradient is wanted.
    """

    expert: Tensor
    order: Tensor
    inverse: Tensor
    counts: tuple[int, ...]
    logits: Optional[Tensor] = None
    gate: Optional[Tensor] = None

    @classmethod
    def decide(cls, logits: Tensor, gate: Optional[str] = 'softmax') -> Routing:
        """Send each image to the expert with the largest logit.

        The gate is ``1 + s - stop_gradient(s)``: with ``gate='softmax'`` s is the softmax probability of the chosen
        expert, bounded in [1/N, 1] with a bounded gradient; with ``gate='logit'`` s is the raw logit, as in the
        AdvMoE reference code, unbounded in both (arXiv:2308.10110 and its public code).

        Args:
            logits (Tensor): (B, N).
            gate (str, optional): ``'softmax'``, ``'logit'`` or None for no gradient to the router.

        Raises:
            ValueError: ``logits`` is not (B, N), or ``gate`` is unknown.
        """
        if logits.dim() != 2:
            raise ValueError(f'router logits must have shape (B, N), got {tuple(logits.shape)}')
        expert = logits.detach().argmax(dim=1)
        routing = cls.fixed(expert, logits.shape[1])
        factor = None
        if gate is not None:
            if gate not in GATES:
                raise ValueError(f'gate={gate!r} is unknown; allowed: {GATES} or None')
            if logits.requires_grad:
                precise = torch.promote_types(logits.dtype, torch.float32)
                scores = logits.softmax(dim=1, dtype=precise) if gate == 'softmax' else logits
                chosen = scores.gather(1, expert[:, None]).squeeze(1)
                factor = 1 + (chosen - chosen.detach())
        return replace(routing, logits=logits, gate=factor)

    @classmethod
    def fixed(cls, expert: Tensor, num_experts: int, logits: Optional[Tensor] = None) -> Routing:
        """Route by a given choice instead of a router's, without a gate.

        Args:
            expert (Tensor): (B,) int64 in [0, ``num_experts``).
            num_experts (int): N.
            logits (Tensor, optional): (B, N) logits of the router that was overruled, to be carried along.

        Raises:
            ValueError: ``expert`` is not (B,) or names an expert that does not exist.
        """
        if expert.dim() != 1:
            raise ValueError(f'a route must have shape (B,), got {tuple(expert.shape)}')
        # One transfer to the host: a batched count, from which a bad index shows as well.
        load = torch.bincount(expert.clamp(min=-1) + 1, minlength=num_experts + 1).tolist()
        if load[0] or len(load) > num_experts + 1:
            raise ValueError(f'a route must name experts in [0, {num_experts}), got {sorted(set(expert.tolist()))}')
        order = torch.argsort(expert, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return cls(expert, order, inverse, tuple(load[1:]), logits)

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.counts)

    @property
    def decisions(self) -> Tensor:
        """What was decided for each image, (B, 1): the expert."""
        return self.expert[:, None]

    @property
    def followed(self) -> Tensor:
        """Whether the router itself chooses this expert, (B,) bool; needs ``logits``."""
        return self.logits.argmax(dim=1) == self.expert

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
        """The same decision without any gradient, for logs."""
        return replace(self, logits=None if self.logits is None else self.logits.detach(), gate=None)


def as_routes(route: Tensor, num_routers: int) -> Sequence[Tensor]:
    """Split a given route into one (B,) route per router.

    Args:
        route (Tensor): (B,), one expert per image for all routers, or (B, L).
        num_routers (int): L.

    Raises:
        ValueError: The shape is neither.
    """
    if route.dim() == 1:
        return [route] * num_routers
    if route.dim() == 2 and route.shape[1] == num_routers:
        return list(route.unbind(1))
    raise ValueError(f'route must have shape (B,) or (B, {num_routers}), got {tuple(route.shape)}')


class RouteContext:
    """What the forward pass under way routes by.

    A backbone and its expert layers share one; it is filled for the length of one forward pass only. There is no
    other channel from a backbone to layers that sit inside a network it does not know.

    Args:
        num_experts (int): N.
        gate (str): See :meth:`Routing.decide`.
    """

    def __init__(self, num_experts: int, gate: str) -> None:
        if gate not in GATES:
            raise ValueError(f'gate={gate!r} is unknown; allowed: {GATES}')
        self.num_experts = num_experts
        self.gate = gate
        self._running = False
        self._given: Union[None, Tensor, Sequence[Tensor]] = None
        self._with_logits = False
        self._gated = True
        self._taken: list[Routing] = []

    def run(
        self,
        given: Union[None, Tensor, Sequence[Tensor]] = None,
        with_logits: bool = False,
        gated: bool = True,
    ) -> RouteContext:
        """Open the context: ``with context.run(...) as routed: ...``; see :meth:`MoEBackbone.forward_routed`."""
        self._given, self._with_logits, self._gated = given, with_logits, gated
        return self

    def __enter__(self) -> RouteContext:
        if self._running:
            raise RuntimeError('a MoEBackbone was entered again from inside its own forward pass')
        self._running, self._taken = True, []
        return self

    def __exit__(self, *_) -> None:
        self._running, self._given, self._taken = False, None, []

    @property
    def taken(self) -> tuple[Routing, ...]:
        """The routings decided so far in this forward pass, in the order of their routers."""
        return tuple(self._taken)

    @property
    def current(self) -> Routing:
        """The image-level routing of this forward pass.

        Raises:
            RuntimeError: An expert layer was called outside the forward pass of its backbone.
        """
        if not self._taken:
            raise RuntimeError('an expert layer can only run inside the forward pass of its MoEBackbone')
        return self._taken[-1]

    def route(self, router: torch.nn.Module, x: Tensor) -> Routing:
        """Let ``router`` decide for ``x``, unless a route was given, and note the decision.

        Args:
            router (BaseRouter): Maps ``x`` to (B, N) logits.
            x (Tensor): The input of the router, (B, ...).

        Raises:
            ValueError: The router gives a number of logits other than N.
        """
        logits = router(x) if self._given is None or self._with_logits else None
        if logits is not None and logits.shape[-1] != self.num_experts:
            raise ValueError(
                f'backbone.num_experts={self.num_experts}, but {type(router).__name__} (backbone.router) gives '
                f'{logits.shape[-1]} logits; it must give one for each expert'
            )
        if self._given is None:
            routing = Routing.decide(logits, self.gate if self._gated else None)
        else:
            routing = Routing.fixed(self._given[len(self._taken)], self.num_experts, logits)
        self._taken.append(routing)
        return routing

    def route_tokens(self, router: torch.nn.Module, x: Tensor, training: bool) -> TokenRouting:
        """Let ``router`` decide for the tokens ``x``, unless a route was given, and note the decision.

        Args:
            router (TokenRouter): See :meth:`TokenRouter.route`.
            x (Tensor): (B, T, C).
            training (bool): As for :meth:`TokenRouter.route`.

        Raises:
            RuntimeError: The layer was called outside the forward pass of its backbone.
        """
        if not self._running:
            raise RuntimeError('an expert layer can only run inside the forward pass of its MoEBackbone')
        given = self._given
        if given is not None and given.dim() > 1:
            start = sum(routing.decisions.shape[1] for routing in self._taken)
            given = given[:, start : start + x.shape[1] * router.top_k]
        routing = router.route(x, given, training, self._gated)
        self._taken.append(routing)
        return routing
