"""The training attack of TRADES and AdvMoE, and the divergence that it maximises."""

from __future__ import annotations

import torch
from mmengine.dist import get_rank, get_world_size
from torch import Tensor

from mmadvmoe.registry import ATTACKS
from mmadvmoe.utils import choose

from .model import full_precision
from .steps import BallAttack
from .views import ROUTES, Victim


@ATTACKS.register_module()
class TRADESAttack(BallAttack):
    """Maximise the divergence of the prediction from the clean one, and that of the routes.

    From x + ``start_noise`` · N(0, I), steps of steepest ascent on KL(f(x) ‖ f(x')), plus ``router_weight`` times the
    sum over routers of KL(router(x) ‖ router(x')) where the model has any; back into the ball and [0, 1] after each.
    Labels are not used. The routers decide; what moves a route is their own divergence, as the gradient of the
    straight-through gate says little about the image and hides that of the pathway.

    In distributed training the noise is drawn for the batch of all processes and each takes the rows of its own images
    (MMEngine's ``DefaultSampler`` gives rank r the samples r, r + W, ...). With the same random state on every rank, W
    processes therefore attack as one with W times the batch does.

    TRADES: arXiv:1901.08573, algorithm 1. AdvMoE: arXiv:2308.10110, whose attack has 2 steps of 5/255 at eps 8/255.

    Args:
        model (Victim): The attacked model.
        eps, norm: See :class:`BallAttack`.
        alpha (float): Step size. Defaults to 5/255.
        steps (int): Number of steps. Defaults to 2.
        start_noise (float): Standard deviation of the start noise; above 0, because the gradient of the divergence
            vanishes at x itself. Defaults to 0.001.
        router_weight (float): Weight of the routers' divergence. Defaults to 1.
        gated (bool): Whether the gradient passes through the gate as well, as in the reference code. Defaults to False.
        route (str): ``'gate'``: the routers decide; or ``'held'``: each image keeps the route of its clean version, and
            the routers are not attacked. Defaults to ``'gate'``.

    Raises:
        ValueError: ``norm`` or ``route`` is unknown, or ``start_noise`` or ``router_weight`` out of range.
    """

    #: Labels are not read, so any kind will do.
    soft_labels = True

    def __init__(
        self,
        model: Victim,
        eps: float = 8 / 255,
        alpha: float = 5 / 255,
        steps: int = 2,
        norm: str = 'Linf',
        start_noise: float = 0.001,
        router_weight: float = 1.0,
        gated: bool = False,
        route: str = 'gate',
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start=False, norm=norm)
        if not start_noise > 0:
            raise ValueError(f'start_noise={start_noise!r} must be above 0')
        if not router_weight >= 0:
            raise ValueError(f'router_weight={router_weight!r} must be at least 0')
        self.start_noise = start_noise
        self.router_weight = router_weight
        self.gated = gated
        self.route = choose(route, ROUTES, 'route')
        # Set for the length of a call that is given a seed; see _noise.
        self.seed: int | None = None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Adversarial images for ``images`` (B, C, H, W) in [0, 1]."""
        images = images.detach().to(self.device)
        with torch.no_grad():
            clean, routings = self.model.forward_routed(images, gated=False)
        held = routings if self.route == 'held' and routings else None
        # Router logits where they count.
        clean_routes = [routing.logits for routing in routings] if self.router_weight and held is None else []
        points = images + self.start_noise * self._noise(images)

        def divergence(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            logits, routings = self.model.forward_routed(points, held, with_logits=False, gated=self.gated)
            total = kl_divergence(clean[rows], logits).sum()
            for clean_route, routing in zip(clean_routes, routings):
                total = total + self.router_weight * kl_divergence(clean_route[rows], routing.logits).sum()
            (grad,) = torch.autograd.grad(total, points)
            return grad, None

        return self._climb(divergence, points, images)[0]

    def _noise(self, images: Tensor) -> Tensor:
        # A given seed belongs to these images alone, whichever process attacks them.
        world = get_world_size() if self.seed is None else 1
        if world == 1:
            return torch.randn_like(images)
        noise = images.new_empty(world * len(images), *images.shape[1:]).normal_()
        return noise[get_rank() :: world]


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(softmax(p) ‖ softmax(q)) of each image, in nats.

    Gradients flow to both arguments, (B, K), or (B, T, N) for routers that decide per token, over which the divergence
    is averaged; detach the one that is to stay. Half-precision logits are taken to float32 first, so the result is the
    same under autocast.

    Raises:
        ValueError: The shapes differ, or there is no batch dimension.
    """
    if p_logits.shape != q_logits.shape or p_logits.dim() < 2:
        raise ValueError(
            'kl_divergence needs two tensors of logits of one shape (B, ..., K), '
            f'got {tuple(p_logits.shape)} and {tuple(q_logits.shape)}'
        )
    p_log, q_log = (full_precision(logits).log_softmax(-1) for logits in (p_logits, q_logits))
    divergence = (p_log.exp() * (p_log - q_log)).sum(-1)
    return divergence.flatten(1).mean(1) if divergence.dim() > 1 else divergence
