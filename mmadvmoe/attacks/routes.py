"""Which routes an attack takes: those of the routers, or held ones.

Dimension letters: B images, D decisions of an image (one per router; of routers for tokens, one per choice of each
token), T tokens, K choices of a token, N experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Union

import torch
from torch import Tensor

from mmadvmoe.moe import Routing, TokenRouting

from .victim import Victim

#: ``'gate'``: the routers decide, as in use. ``'held'``: each image keeps the route of its clean version.
ROUTES = ('gate', 'held')


def check_route(route: str) -> str:
    """Give ``route`` back if it is one of :data:`ROUTES`.

    Raises:
        ValueError: It is not.
    """
    if route not in ROUTES:
        near = get_close_matches(str(route), ROUTES, n=1, cutoff=0.5)
        hint = f' (did you mean {near[0]!r}?)' if near else ''
        raise ValueError(f'route={route!r} is unknown{hint}; allowed: {ROUTES}')
    return route


def decisions(routings: Sequence[Union[Routing, TokenRouting]]) -> Tensor:
    """The decisions of all routers side by side, (B, D) int64: a route that can be given to the model."""
    return torch.cat([routing.decisions for routing in routings], dim=1)


@torch.no_grad()
def clean_route(victim: Victim, images: Tensor) -> Tensor:
    """The decisions of the routers on ``images`` (B, C, H, W): (B, D) int64."""
    return decisions(victim.decide_routes(images))


class HeldVictim(Victim):
    """A victim that takes one route for whatever it is shown, so that any attack can be run with the route held.

    Args:
        victim (Victim): The view of a mixture of experts that lets the routers decide.
    """

    def __init__(self, victim: Victim) -> None:
        super().__init__(*victim._held, num_classes=victim._num_classes)
        self._route: Tensor | None = None

    @contextmanager
    def holding(self, route: Tensor) -> Iterator[None]:
        """Hold a route inside.

        Args:
            route (Tensor): The decisions of one image, (D,) int64.
        """
        self._route = route
        try:
            yield
        finally:
            self._route = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of the pathway that the held route is."""
        return self.forward_routed(images, with_logits=False)[0]

    def forward_routed(
        self, images: Tensor, route: Tensor | None = None, with_logits: bool = True, gated: bool = True
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """See :meth:`Victim.forward_routed`; where no route is given the held one is taken.

        Raises:
            RuntimeError: No route is given, and none is held.
        """
        if route is None:
            if self._route is None:
                raise RuntimeError('no route is held; call this victim inside holding(route)')
            route = self._route.expand(len(images), -1)
        return super().forward_routed(images, route, with_logits, gated)
