"""Whether the gradient of a model says anything about it.

Dimension letters: B images, K classes.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadvmoe.attacks import Victim
from mmadvmoe.attacks import steps as ball

from .threat_model import ThreatModel
from .trials import Images

#: Length of the step that is tried, as a part of eps, and the random directions it is compared with.
_STEP = 0.05
_DIRECTIONS = 10


def gradients(victim: Victim, data: Images, route: Optional[Tensor] = None) -> Tensor:
    """Gradient of the cross entropy at each image, (B, C, H, W), with the routes given and so without a gate.

    Args:
        victim: The model.
        data: The images.
        route: (B, D), or None for a dense model.
    """
    parts = []
    with torch.enable_grad(), victim.frozen():
        for rows in data.chunks():
            points = data.images[rows].detach().clone().requires_grad_()
            logits = _logits(victim, points, route, rows)
            loss = F.cross_entropy(logits, data.labels[rows], reduction='sum')
            parts.append(torch.autograd.grad(loss, points)[0])
    return torch.cat(parts)


@torch.no_grad()
def ascents(
    victim: Victim, data: Images, threat: ThreatModel, grad: Tensor, route: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """What a small step along the gradient gains, and what the best of some random steps of that length gains.

    Gained is the margin of the best wrong class over the true one, which, unlike the cross entropy, does not saturate.

    Args:
        victim: The model.
        data: The images.
        threat: For norm and eps.
        grad: Of :func:`gradients`.
        route: As there.

    Returns:
        The gains along the gradient, (B,), and the largest ones along random directions, (B,).
    """
    along, best = [], []
    generator = torch.Generator(data.images.device).manual_seed(data.seed)
    with victim.frozen():
        for rows in data.chunks():
            images, labels = data.images[rows], data.labels[rows]
            before = _margin(_logits(victim, images, route, rows), labels)

            def gain(direction: Tensor, images=images, labels=labels, before=before, rows=rows) -> Tensor:
                points = ball.ascend(images, direction, _STEP * threat.eps, threat.norm)
                # Not cut to [0, 1]: that would take another part of each step away.
                return _margin(_logits(victim, points, route, rows), labels) - before

            along.append(gain(grad[rows]))
            noise = (torch.randn(images.shape, generator=generator, device=images.device) for _ in range(_DIRECTIONS))
            best.append(torch.stack([gain(direction) for direction in noise]).amax(0))
    return torch.cat(along), torch.cat(best)


def median_margin(logits: Tensor) -> float:
    """Median over the images of the distance of the two largest of the logits (B, K)."""
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return float((first - second).median())


def _logits(victim: Victim, images: Tensor, route: Optional[Tensor], rows: slice) -> Tensor:
    if route is None:
        return victim(images)
    return victim.forward_routed(images, route[rows].to(images.device), with_logits=False)[0]


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    true = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - true
