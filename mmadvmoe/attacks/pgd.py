"""Projected gradient descent in any norm, with restarts and with the routers' or a held route."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadvmoe.registry import ATTACKS
from mmadvmoe.utils import choose

from .steps import BallAttack
from .views import ROUTES, Victim


@ATTACKS.register_module()
class PGD(BallAttack):
    """Maximise the cross entropy by projected steepest ascent (Madry et al., arXiv:1706.06083).

    With its defaults it does what torchattacks' PGD does, with the same random start for the same seed; there the
    cross entropy is averaged over the batch, which leaves its sign as it is.

    On a mixture of experts, ``route='held'`` attacks the experts alone: the pathway that each clean image takes,
    whatever the routers would say of the adversarial one. With ``'gate'`` the routers decide, and the gradient
    passes through the gate as well. On a model without routers both are the same.

    Args:
        model (Victim): The attacked model.
        eps, alpha, random_start, norm: See :class:`BallAttack`.
        steps (int): Steps of each run. Defaults to 10.
        restarts (int): Runs from a new random start each, the first one included. An image that a run fools, judged
            by the logits that are attacked, is in no further one; of the others the point with the largest cross
            entropy is kept. Defaults to 1.
        route (str): ``'gate'`` or ``'held'``. Defaults to ``'gate'``.

    In torchattacks' targeted modes (``targeted`` in a config) it lowers the cross entropy of the target, and an image
    that is taken for it is fooled.

    Raises:
        ValueError: ``norm`` or ``route`` is unknown, or there are restarts without a random start.
    """

    # Class probabilities do for labels.
    soft_labels = True

    def __init__(
        self,
        model: Victim,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        norm: str = 'Linf',
        restarts: int = 1,
        route: str = 'gate',
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start, norm, restarts)
        self.route = choose(route, ROUTES, 'route')
        self.supported_mode = ['default', 'targeted']

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Where the run ended, for labels (B,) or class probabilities (B, K); with several runs, the worst cases."""
        images, labels = images.detach().to(self.device), labels.to(self.device)
        if self.targeted:
            labels = self.get_target_label(images, labels)
        held = None
        if self.route == 'held' and self.model.num_routers:
            with torch.no_grad():
                held = tuple(routing.detach() for routing in self.model.decide_routes(images))

        def losses(points: Tensor, rows: Tensor, route: tuple | None) -> tuple[Tensor, Tensor]:
            """What is maximised (b,), and whether the image is fooled (b,)."""
            logits = self._logits(points, route)
            target = labels[rows]
            as_labelled = logits.argmax(1) == (target if target.dim() == 1 else target.argmax(1))
            cross_entropy = F.cross_entropy(logits, target, reduction='none')
            return (-cross_entropy, as_labelled) if self.targeted else (cross_entropy, ~as_labelled)

        adversarial = images.clone()
        largest = images.new_full((len(images),), -torch.inf)
        remaining = torch.arange(len(images), device=images.device)
        for _ in range(self.restarts):
            start = self._start(images)
            if not len(remaining):
                break
            route = held
            if held is not None and len(remaining) < len(images):
                route = tuple(routing.take(remaining) for routing in held)

            def gradient(
                points: Tensor, _: Tensor, rows: Tensor = remaining, route: tuple | None = route
            ) -> tuple[Tensor, None]:
                (grad,) = torch.autograd.grad(losses(points, rows, route)[0].sum(), points)
                return grad, None

            points, _ = self._climb(gradient, start[remaining], images[remaining])
            if self.restarts == 1:
                return points
            with torch.no_grad():
                loss, fooled = losses(points, remaining, route)
            # Written so that a loss that is no number shows in the images.
            better = fooled | ~(loss <= largest[remaining])
            adversarial[remaining[better]], largest[remaining[better]] = points[better], loss[better]
            remaining = remaining[~fooled]
        return adversarial

    def _logits(self, points: Tensor, route: tuple | None) -> Tensor:
        if route is None:
            return self.get_logits(points)
        return self.model.forward_routed(points, route, with_logits=False)[0]
