"""What gradient attacks share: the start, a step of steepest ascent, the way back into the ball.

Images are (B, C, H, W) in [0, 1]; ``eps`` and ``alpha`` are in the same unit.
"""

from difflib import get_close_matches

import torch
from torch import Tensor

from .projections import shrink

#: Norms of the threat models on offer.
NORMS = ('Linf', 'L2', 'L1')

#: Share of the coordinates that a step in L1 moves.
_L1_SHARE = 0.05


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

    Uniform in the cube for ``'Linf'``; for ``'L2'`` and ``'L1'`` in a direction that is uniform on the sphere of that
    norm, at a uniform distance.
    """
    if norm == 'Linf':
        offset = torch.empty_like(images).uniform_(-eps, eps)
    else:
        offset = torch.randn_like(images)
        if norm == 'L1':
            offset = offset.sign() * torch.empty_like(images).exponential_()
        radius = eps * torch.rand(len(images), device=images.device, dtype=images.dtype)
        offset = _per_image(radius / _length(offset, norm), images) * offset
    return (images + offset).clamp(0, 1)


def ascend(points: Tensor, grad: Tensor, alpha: float, norm: str) -> Tensor:
    """One step of length ``alpha`` along the steepest ascent in ``norm``.

    In L1 the steepest step of all would move a single pixel, which another would do at the next. Here it moves the
    twentieth of the coordinates (at least one) with the largest gradients, equally far: the steepest of the steps of
    this length that move no coordinate further (Tramer & Boneh, arXiv:1904.13000, algorithm 1). Coordinates that stand
    at 0 or 1 and would have to leave [0, 1] are passed over.

    A zero gradient leaves its image where it is.
    """
    if norm == 'Linf':
        return points + alpha * grad.sign()
    if norm == 'L1':
        grad = _largest_free(points, grad).sign()
    length = _length(grad, norm)
    scale = torch.where(length > 0, alpha / length, torch.zeros_like(length))
    return points + _per_image(scale, grad) * grad


def project(points: Tensor, images: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest point of the ball of radius ``eps`` around ``images`` that is in [0, 1]; see :mod:`.projections`."""
    if norm == 'Linf':
        return (images + (points - images).clamp(-eps, eps)).clamp(0, 1)
    offset = (points - images).flatten(1)
    centre = images.flatten(1)
    shrunk = shrink(offset, torch.where(offset > 0, 1 - centre, centre), eps, norm)
    nearest = (centre + shrunk).to(images.dtype)
    # Many coordinates rounded away from the image would add up.
    too_far = (nearest.double() - centre.double()).abs() > shrunk.abs()
    return torch.where(too_far, torch.nextafter(nearest, centre), nearest).view_as(images)


def _largest_free(points: Tensor, grad: Tensor) -> Tensor:
    """The largest entries of the gradient of each image that do not lead out of [0, 1]; 0 elsewhere."""
    leaves = (points <= 0) & (grad < 0) | (points >= 1) & (grad > 0)
    flat = grad.masked_fill(leaves, 0).flatten(1)
    count = max(1, round(_L1_SHARE * flat.shape[1]))
    where = flat.abs().topk(count, dim=1).indices
    return torch.zeros_like(flat).scatter(1, where, flat.gather(1, where)).view_as(grad)


def _length(x: Tensor, norm: str) -> Tensor:
    return x.flatten(1).norm(p=2 if norm == 'L2' else 1, dim=1)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
