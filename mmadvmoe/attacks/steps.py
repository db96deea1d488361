"""What gradient attacks share: the start, a step of steepest ascent, the way back into the ball.

Images are (B, C, H, W) in [0, 1]; ``eps`` and ``alpha`` are in the same unit.
"""

from difflib import get_close_matches

import torch
from torch import Tensor

#: Norms of the threat models on offer.
NORMS = ('Linf', 'L2')


def check_norm(norm: str) -> str:
    """Give ``norm`` back if it is one of :data:`NORMS`.

    Raises:
        ValueError: It is not.
    """
    if norm not in NORMS:
        near = get_close_matches(str(norm), NORMS, n=1, cutoff=0.5)
        hint = f' (did you mean {near[0]!r}?)' if near else ''
        raise ValueError(f'norm={norm!r} is not supported{hint}; allowed: {NORMS}')
    return norm


def check_restarts(restarts: int, random_start: bool) -> int:
    """Give ``restarts`` back if that many runs can differ.

    Raises:
        ValueError: There are several, which would all start at the clean image.
    """
    if restarts > 1 and not random_start:
        raise ValueError(f'restarts={restarts} without a random start are the same run; set random_start=True')
    return restarts


def random_start(images: Tensor, eps: float, norm: str) -> Tensor:
    """A random point of the ball around each image, cut to [0, 1].

    Uniform in the cube for ``'Linf'``; for ``'L2'`` in a uniform direction at a uniform distance.
    """
    if norm == 'Linf':
        offset = torch.empty_like(images).uniform_(-eps, eps)
    else:
        offset = torch.randn_like(images)
        radius = eps * torch.rand(len(images), device=images.device, dtype=images.dtype)
        offset = _per_image(radius / _l2(offset), images) * offset
    return (images + offset).clamp(0, 1)


def ascend(points: Tensor, grad: Tensor, alpha: float, norm: str) -> Tensor:
    """One step of length ``alpha`` along the steepest ascent in ``norm``.

    A zero gradient leaves its image where it is.
    """
    if norm == 'Linf':
        return points + alpha * grad.sign()
    length = _l2(grad)
    scale = torch.where(length > 0, alpha / length, torch.zeros_like(length))
    return points + _per_image(scale, grad) * grad


def project(points: Tensor, images: Tensor, eps: float, norm: str) -> Tensor:
    """Bring ``points`` back into the ball of radius ``eps`` around ``images`` and into [0, 1]."""
    offset = points - images
    if norm == 'Linf':
        offset = offset.clamp(-eps, eps)
    else:
        length = _l2(offset)
        scale = torch.where(length > eps, eps / length, torch.ones_like(length))
        offset = _per_image(scale, offset) * offset
    return (images + offset).clamp(0, 1)


def _l2(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
