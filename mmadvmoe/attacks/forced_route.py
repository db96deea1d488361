"""The part of RoutePGD that aims at one expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .route_pgd import RoutePGD
from .victim import Victim


class ForcedRoutePGD(RoutePGD):
    """Push the routers to one expert, and attack that expert; see :class:`RoutePGD`, of which this is one run.

    Args:
        model (Victim): The attacked mixture.
        expert (int): In [0, N).
        **kwargs: Arguments of :class:`RoutePGD`.
    """

    def __init__(self, model: Victim, expert: int, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.expert = expert

    def _runs(self, routings: tuple, batch: int) -> Iterator[tuple[Tensor | None, bool]]:
        yield torch.full((batch,), self.expert, device=self.device), True
