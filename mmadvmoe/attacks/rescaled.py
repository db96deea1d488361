"""A model with its logits on another scale, which changes no prediction."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from mmadvmoe.moe import Routing

from .victim import Victim


class Rescaled(Victim):
    """A victim whose class logits are divided by a constant.

    Its predictions are the same. But where logits are so large that the softmax leaves no gradient, an attack on the
    cross entropy of this model finds what it cannot find on the model itself.

    Args:
        victim (Victim): The model.
        scale (float): What its logits are divided by, above 0.

    Raises:
        ValueError: ``scale`` is not above 0.
    """

    def __init__(self, victim: Victim, scale: float) -> None:
        super().__init__(*victim._held, victim.num_classes)
        if not scale > 0:
            raise ValueError(f'scale={scale!r} must be above 0')
        self._original = (victim,)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of ``images`` (B, C, H, W) in [0, 1]."""
        return self._original[0](images) / self.scale

    def forward_routed(
        self, images: Tensor, route: Optional[Tensor] = None, with_logits: bool = True, gated: bool = True
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """See :meth:`Victim.forward_routed`; the logits of the routers are as they were."""
        logits, routings = self._original[0].forward_routed(images, route, with_logits, gated)
        return logits / self.scale, routings
