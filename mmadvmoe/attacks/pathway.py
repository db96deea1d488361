"""One expert of a mixture, as a model of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from mmadvmoe.moe import Routing

from .victim import Victim


class Pathway(Victim):
    """The network that is left of a mixture when one expert computes everything.

    To an attack it is a model without routers, so any attack finds what this expert does wrong and nothing of what
    the routers do wrong.

    Args:
        victim (Victim): The mixture.
        expert (int): In [0, N). All routers are overruled; with token-level routing and top K > 1, each token takes
            this expert and the K - 1 others that its router likes best.

    Raises:
        ValueError: The model has no routers, or no such expert.
    """

    num_experts = 1
    num_routers = 0

    def __init__(self, victim: Victim, expert: int) -> None:
        super().__init__(*victim._held, victim.num_classes)
        if not victim.num_routers:
            raise ValueError('a pathway is one of several in a mixture of experts, but this model has no routers')
        if not 0 <= expert < victim.num_experts:
            raise ValueError(f'expert={expert} does not exist; allowed: 0 to {victim.num_experts - 1}')
        self._mixture = (victim,)
        self.expert = expert

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of ``images`` (B, C, H, W) in [0, 1]."""
        route = torch.full((len(images),), self.expert, device=images.device)
        return self._mixture[0].forward_routed(images, route, with_logits=False, gated=False)[0]

    def forward_routed(
        self, images: Tensor, route: None = None, with_logits: bool = True, gated: bool = True
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Logits, and no decisions, for there are none to take.

        Raises:
            ValueError: A route is given to what has one already.
        """
        if route is not None:
            raise ValueError('a route was given to a pathway, which is one already')
        return self(images), ()
