"""Gradient attacks inside a ball: the start, a step of steepest ascent, the way back, and the loop that they all run.

Images are (B, C, H, W) in [0, 1]; ``eps`` and ``alpha`` are in the same unit. In projections D are the coordinates of
an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchattacks.attack import Attack

from mmadvmoe.utils import choose

from .views import Victim

#: Norms of the threat models on offer, each with its p.
ORDERS = dict(Linf=math.inf, L2=2, L1=1)
NORMS = tuple(ORDERS)

#: ``ascent(points, rows) -> (direction, arrived)``; see :meth:`BallAttack._climb`.
Ascent = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

#: Share of the coordinates that a step in L1 moves.
_L1_SHARE = 0.05


class BallAttack(Attack):
    """Base of attacks by projected steepest ascent, from random starts or from the image itself.

    Args:
        model (Victim): The attacked model.
        eps (float): Radius of the ball, on [0, 1] images. Defaults to 8/255.
        alpha (float): Step size. Defaults to 2/255.
        steps (int): Steps of each run. Defaults to 50.
        random_start (bool): Start each run at a random point of the ball. Defaults to True.
        norm (str): ``'Linf'``, ``'L2'`` or ``'L1'``. Defaults to ``'Linf'``.
        restarts (int): How often all runs are made, each time from new random starts. Defaults to 1.

    Raises:
        ValueError: ``norm`` is unknown, or there are restarts without a random start.
    """

    def __init__(
        self,
        model: Victim,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 50,
        random_start: bool = True,
        norm: str = 'Linf',
        restarts: int = 1,
    ) -> None:
        super().__init__(type(self).__name__, model)
        self._check_model(model)
        if restarts > 1 and not random_start:
            raise ValueError(f'restarts={restarts} without a random start are the same run; set random_start=True')
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.norm = check_norm(norm)
        self.restarts = restarts

    def _check_model(self, model: Victim) -> None:
        """Refuse what the attack cannot attack."""

    def _start(self, images: Tensor) -> Tensor:
        """Where a run starts. To be drawn for all images: the start of one must not depend on the fate of others."""
        return random_start(images, self.eps, self.norm) if self.random_start else images

    def _climb(self, ascent: Ascent, start: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Take steps of steepest ascent, each followed by the way back into the ball and [0, 1].

        Args:
            ascent (Callable): Given points (b, C, H, W) that require a gradient and the rows (b,) of ``images`` that
                they belong to, gives the direction to climb, of the shape of the points, and None, or which points have
                arrived (b,). Those stay where they are, and their direction is not looked at.
            start (Tensor): Where each image starts, (B, C, H, W).
            images (Tensor): The centres of the balls, (B, C, H, W) in [0, 1].

        Returns:
            tuple: Where each image ended, (B, C, H, W), and which ones had arrived before the last step was made, (B,).
        """
        points, ended = start.detach(), torch.empty_like(start)
        arrived = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        rows = torch.arange(len(images), device=images.device)
        for _ in range(self.steps):
            direction, done = ascent(points.requires_grad_(), rows)
            points = points.detach()
            if done is not None and done.any():
                ended[rows[done]], arrived[rows[done]] = points[done], True
                points, direction, images, rows = (part[~done] for part in (points, direction, images, rows))
                if not len(rows):
                    break
            points = project(ascend(points, direction, self.alpha, self.norm), images, self.eps, self.norm)
        ended[rows] = points
        return ended, arrived


def check_norm(norm: str) -> str:
    """Give ``norm`` back if it is one of :data:`NORMS`; else raise ValueError."""
    return choose(norm, NORMS, 'norm')


def largest_distance(num_values: int, norm: str) -> float:
    """How far apart two images of so many numbers in [0, 1] can be: a ball of that radius holds every image."""
    return num_values ** (1 / ORDERS[norm])


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
    this length that move no coordinate further (Tramer & Boneh, arXiv:1904.13000, algorithm 1). Coordinates that are
    at 0 or 1 and would have to leave [0, 1] are passed over.

    A zero gradient leaves its image where it is, and however small another is it makes a whole step. Of NaN, which can
    be a step of 0, :class:`~mmadvmoe.attacks.BoundAttack` takes care.
    """
    if norm == 'Linf':
        return points + alpha * grad.sign()
    grad = _largest_free(points, grad).sign() if norm == 'L1' else by_largest_entry(grad)
    length = _length(grad, norm)
    scale = torch.where(length > 0, alpha / length, torch.zeros_like(length))
    return points + _per_image(scale, grad) * grad


def by_largest_entry(grad: Tensor) -> Tensor:
    """Each image's gradient with a largest entry of 1, whose norm neither overflows nor vanishes; zero stays zero."""
    peak = grad.flatten(1).abs().amax(1)
    return grad / _per_image(torch.where(peak > 0, peak, torch.ones_like(peak)), grad)


def project(points: Tensor, images: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest point of the ball of radius ``eps`` around ``images`` that is in [0, 1], exactly."""
    if norm == 'Linf':
        return (images + (points - images).clamp(-eps, eps)).clamp(0, 1)
    offset = (points - images).flatten(1)
    centre = images.flatten(1)
    shrunk = _shrink(offset, torch.where(offset > 0, 1 - centre, centre), eps, norm)
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
    return x.flatten(1).norm(p=ORDERS[norm], dim=1)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _shrink(offset: Tensor, room: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest offset of length at most ``eps`` whose coordinates fit in the room.

    Projecting on the ball and then cutting to [0, 1] gives a point of both, but not the nearest one: the radius that
    the cut has saved is lost. In the intersection the coordinates of the nearest offset are
    ``clamp(|u| / (1 + m), 0, r)`` for L2 and ``clamp(|u| - m, 0, r)`` for L1, with the signs of the offset u, the room
    r that a pixel has in that way, and the least m >= 0 at which the length is eps. As a function of m the length is
    made of pieces between which coordinates become free or zero. The ends of the pieces are sorted, and the equation
    solved in the piece that has the solution (for L1: Croce & Hein, arXiv:2103.01208, proposition 2.1).

    Args:
        offset (Tensor): (B, D).
        room (Tensor): How far each coordinate may go in its direction, (B, D), at least 0.
        eps (float): Largest length.
        norm (str): ``'L2'`` or ``'L1'``.

    Returns:
        Tensor: (B, D), of type float64.
    """
    size, room = offset.abs().double(), room.double()
    solve = _shrink_l2 if norm == 'L2' else _shrink_l1
    shrunk = torch.minimum(size, room)
    # Written so that NaN is not taken for inside.
    outside = ~(shrunk.norm(p=ORDERS[norm], dim=1, keepdim=True) <= eps)
    # For all images, as a look at which ones need it would make the host wait in every step.
    near = solve(size, room, eps)
    length = near.norm(p=ORDERS[norm], dim=1, keepdim=True)
    # What rounding has left.
    near = near * torch.where(length > eps, eps / length, torch.ones_like(length))
    return torch.where(outside, near, shrunk) * offset.sign()


def _shrink_l2(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """``clamp(s * size, max=room)`` with s in [0, 1] such that the length is ``eps``."""
    # Where a coordinate reaches its room; those that never do come last.
    ends = torch.where(size > 0, room / size.clamp(min=1e-300), torch.full_like(size, torch.inf))
    ends, order = ends.sort(1)
    full = room.gather(1, order).square().cumsum(1)
    squares = size.gather(1, order).square()
    free = squares.flip(1).cumsum(1).flip(1) - squares
    # Squared length at each end; infinite where it lies beyond any scale.
    reached = torch.where(free > 0, full + ends.square() * free, full)
    reached = reached.masked_fill(ends.isinf(), torch.inf)
    piece = (reached < eps**2).sum(1, keepdim=True)
    before = (piece - 1).clamp(min=0)
    done = torch.where(piece > 0, full.gather(1, before), torch.zeros_like(full[:, :1]))
    left = torch.where(piece > 0, free.gather(1, before), squares.sum(1, keepdim=True))
    scale = ((eps**2 - done).clamp(min=0) / left).sqrt()
    return torch.minimum(scale * size, room)


def _shrink_l1(size: Tensor, room: Tensor, eps: float) -> Tensor:
    """``clamp(size - m, min=0, max=room)`` with m >= 0 such that the sum is ``eps``."""
    # A coordinate is free, and falls with m, from the first of these ends to the second.
    starts, stops = (size - room).clamp(min=0), size
    ends, order = torch.cat([starts, stops], dim=1).sort(1)
    change = torch.cat([-torch.ones_like(size), torch.ones_like(size)], dim=1).gather(1, order)
    slope = change.cumsum(1)
    falls = slope[:, :-1] * ends.diff(dim=1)
    total = torch.minimum(size, room).sum(1, keepdim=True)
    # Length at each end: it does not fall before the first one.
    lengths = torch.cat([total, total + falls.cumsum(1)], dim=1)
    piece = ((lengths > eps).sum(1, keepdim=True) - 1).clamp(min=0)
    length, end, fall = (part.gather(1, piece) for part in (lengths, ends, slope))
    multiplier = end + (length - eps) / (-fall).clamp(min=1)
    return torch.minimum((size - multiplier).clamp(min=0), room)
