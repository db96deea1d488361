"""What the attacks of this package that climb inside a ball have in common."""

from __future__ import annotations

from torch import Tensor, nn
from torchattacks.attack import Attack

from mmadvmoe.attacks import steps as ball

from .climb import Objective, climb


class BallAttack(Attack):
    """Base of attacks by projected steepest ascent, from random starts or from the image itself.

    Args:
        name (str): Name of the attack.
        model (nn.Module): The attacked model.
        eps (float): Radius of the ball, on [0, 1] images.
        alpha (float): Step size.
        steps (int): Steps of each run.
        random_start (bool): Start each run at a random point of the ball.
        norm (str): ``'Linf'``, ``'L2'`` or ``'L1'``.
        restarts (int): How often runs are made.

    Raises:
        ValueError: ``norm`` is unknown, or there are restarts without a random start.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        eps: float,
        alpha: float,
        steps: int,
        random_start: bool,
        norm: str,
        restarts: int,
    ) -> None:
        super().__init__(name, model)
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.norm = ball.check_norm(norm)
        self.restarts = ball.check_restarts(restarts, random_start)

    def _start(self, images: Tensor) -> Tensor:
        """Where a run starts. To be drawn for all images: the start of one must not depend on the fate of others."""
        return ball.random_start(images, self.eps, self.norm) if self.random_start else images

    def _climb(self, objective: Objective, start: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`climb` with the settings of this attack."""
        return climb(objective, start, images, eps=self.eps, alpha=self.alpha, steps=self.steps, norm=self.norm)
