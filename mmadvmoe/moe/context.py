"""Carry the routes of a forward pass from a backbone to its expert layers."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmadvmoe.utils import choose

from .routers import BaseRouter, TokenRouter
from .routing import GATES, BaseRouting, NonFiniteRouterError, Route, Routing
from .token_routing import TokenRouting


@dataclass(eq=False)
class RoutedPass:
    """The routes of one forward pass, given and taken so far; see :meth:`RouteContext.run`."""

    num_experts: int
    gate: str
    names: Sequence[str]
    batch: int
    given: Route | None
    with_logits: bool
    gated: bool
    _columns: int = 0
    _taken: list[BaseRouting] = field(default_factory=list)

    @property
    def taken(self) -> tuple[BaseRouting, ...]:
        """The routings decided so far, in the order of their routers."""
        return tuple(self._taken)

    @property
    def current(self) -> Routing:
        """The latest routing; with image-level routing that of the whole pass."""
        return self._taken[-1]

    def route(self, router: BaseRouter, x: Tensor) -> Routing:
        """Let ``router`` decide for the images ``x`` (B, ...), unless a route was given, and note the decision.

        Raises:
            ValueError: The router gives a number of logits other than N.
            NonFiniteRouterError: It gives logits that are not finite.
        """
        given = self._next(1, len(x))
        logits = router(x) if given is None or self.with_logits else None
        if logits is not None and logits.shape[-1] != self.num_experts:
            raise ValueError(
                f'backbone.num_experts={self.num_experts}, but {type(router).__name__} (backbone.router) gives '
                f'{logits.shape[-1]} logits; it must give one for each expert'
            )
        try:
            if given is None:
                routing = Routing.decide(logits, self.gate if self.gated else None)
            elif isinstance(given, Tensor):
                routing = Routing.fixed(given.flatten(), self.num_experts, logits)
            else:
                routing = given.again(logits)
        except NonFiniteRouterError:
            raise NonFiniteRouterError(self.names[len(self._taken)]) from None
        self._taken.append(routing)
        return routing

    def route_tokens(self, router: TokenRouter, x: Tensor, training: bool) -> TokenRouting:
        """Let ``router`` decide for the tokens ``x`` (B, T, C), unless a route was given, and note the decision."""
        routing = router.route(x, self._next(x.shape[1] * router.top_k, len(x)), training, self.gated)
        self._taken.append(routing)
        return routing

    def check_rows(self, name: str, x: Tensor) -> None:
        """Check that what the layer ``name`` is given, (B, ...), has one row for each image.

        Raises:
            ValueError: It has another number of rows, as windows of images have.
        """
        if len(x) != self.batch:
            raise ValueError(
                f'the expert layer {name!r} is given {len(x)} rows for {self.batch} images (windows or parts of '
                'them), for which there is no route; name it in backbone.exclude, or give experts to the layers of the '
                "feed-forward networks: include=['ffn']"
            )

    def check_spent(self) -> None:
        """Check that the route that was given has no more columns than the routers took.

        Raises:
            ValueError: It has more.
        """
        if isinstance(self.given, Tensor) and self.given.dim() > 1 and self.given.shape[1] != self._columns:
            raise ValueError(
                f'route has {self.given.shape[1]} columns, but the choices of all tokens in all layers are '
                f'{self._columns}; a route that was taken at another image size does not fit'
            )

    def check_finite(self) -> None:
        """Check the logits of all routers that decided, at the cost of one transfer from the device.

        Not those of routers that were given a route: what they compute shows in the logits of the classes.

        Raises:
            NonFiniteRouterError: Naming the first whose logits are not finite.
        """
        if self.given is not None:
            return
        finite = torch.stack([routing.logits.detach().isfinite().all() for routing in self._taken]).tolist()
        if not all(finite):
            raise NonFiniteRouterError(self.names[finite.index(False)])

    def _next(self, columns: int, batch: int) -> None | Tensor | BaseRouting:
        """The given route of the next router, (B,) or (B, columns), or its routing of an earlier pass, or None."""
        start, self._columns = self._columns, self._columns + columns
        if self.given is None:
            return None
        if isinstance(self.given, Tensor):
            return self.given if self.given.dim() == 1 else self.given[:, start : start + columns]
        routing = self.given[len(self._taken)]
        shape = len(routing.expert), routing.num_experts, math.prod(routing.expert.shape[1:])
        if shape != (batch, self.num_experts, columns):
            raise ValueError(
                f'a routing of {shape[0]} images, {shape[1]} experts and {shape[2]} decisions for each image does not '
                f'fit a router that takes {columns} decisions between {self.num_experts} experts for each of {batch} '
                'images; a route may be given as the routings of an earlier pass on the same batch'
            )
        return routing


class RouteContext:
    """The forward pass that is under way in this thread.

    A backbone and its expert layers share one: there is no other channel from a backbone to layers inside a network
    that it does not know. Threads do not see each other's passes; a copy has none.
    """

    def __init__(self, num_experts: int, gate: str) -> None:
        self.num_experts = num_experts
        self.gate = choose(gate, GATES, 'backbone.gate')
        self._local = threading.local()

    def __getstate__(self) -> dict:
        return dict(num_experts=self.num_experts, gate=self.gate)

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    @contextmanager
    def run(
        self, names: Sequence[str], batch: int, route: Route | None, with_logits: bool, gated: bool
    ) -> Iterator[RoutedPass]:
        """Begin a forward pass of this thread, of ``batch`` images through the routers ``names``.

        Other arguments as in :meth:`MoEBackbone.forward_routed`.

        Raises:
            RuntimeError: One is under way in this thread.
        """
        if getattr(self._local, 'running', None) is not None:
            raise RuntimeError('a MoEBackbone was entered again from inside its own forward pass')
        self._local.running = RoutedPass(self.num_experts, self.gate, names, batch, route, with_logits, gated)
        try:
            yield self._local.running
        finally:
            self._local.running = None

    @property
    def running(self) -> RoutedPass:
        """The forward pass that is under way in this thread.

        Raises:
            RuntimeError: There is none.
        """
        running = getattr(self._local, 'running', None)
        if running is None:
            raise RuntimeError(
                'an expert layer can only run inside the forward pass of its MoEBackbone, as the routes are those of '
                'that pass; leave out what runs it again in the backward pass (activation_checkpointing in the config)'
            )
        return running
