"""The way back into the ball and into [0, 1] at once, exactly.

Dimension letters: B images, D coordinates of one.

Projecting on the ball and then cutting to [0, 1] gives a point of both, but not the nearest one: the radius that the
cut has saved is lost. In the intersection the coordinates of the nearest offset are ``clamp(|u| / (1 + m), 0, r)`` for
L2 and ``clamp(|u| - m, 0, r)`` for L1, with the signs of the offset u, the room r that a pixel has in that way, and
the least m >= 0 at which the length is eps. As a function of m the length is made of pieces between which coordinates
become free or zero. The ends of the pieces are sorted, and the equation solved in the piece that has the solution (for
L1: Croce & Hein, arXiv:2103.01208, proposition 2.1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def shrink(offset: Tensor, room: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest offset of length at most ``eps`` whose coordinates fit in the room.

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
    order = 2 if norm == 'L2' else 1
    shrunk = torch.minimum(size, room)
    # Written so that NaN is not taken for inside.
    outside = ~(shrunk.norm(p=order, dim=1) <= eps)
    if outside.any():
        near = solve(size[outside], room[outside], eps)
        length = near.norm(p=order, dim=1, keepdim=True)
        # What rounding has left.
        shrunk[outside] = near * torch.where(length > eps, eps / length, torch.ones_like(length))
    return shrunk * offset.sign()


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
