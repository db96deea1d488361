"""The loop that every gradient attack of this package runs: projected steepest ascent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from mmadvmoe.attacks import steps as ball

#: ``objective(points, rows) -> (gradient, arrived)``; see :func:`climb`.
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Optional[Tensor]]]


def climb(
    objective: Objective, start: Tensor, images: Tensor, *, eps: float, alpha: float, steps: int, norm: str
) -> tuple[Tensor, Tensor]:
    """Steps of steepest ascent, each followed by the way back into the ball and [0, 1].

    Args:
        objective (Callable): Given points (b, C, H, W) that require a gradient and the rows (b,) of ``images`` that
            they belong to, gives the direction to climb, of the shape of the points, and None, or which points have
            arrived (b,). Those stay where they are, and their direction is not looked at.
        start (Tensor): Where each image starts, (B, C, H, W).
        images (Tensor): The centres of the balls, (B, C, H, W) in [0, 1].
        eps (float): Radius of the ball, on [0, 1] images.
        alpha (float): Length of a step.
        steps (int): Number of steps.
        norm (str): Norm of the ball and of the steps.

    Returns:
        tuple: Where each image ended, (B, C, H, W), and which ones had arrived before the last step was made, (B,).
    """
    points, ended = start.detach(), torch.empty_like(start)
    arrived = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    for _ in range(steps):
        grad, done = objective(points.requires_grad_(), rows)
        points = points.detach()
        if done is not None and done.any():
            ended[rows[done]], arrived[rows[done]] = points[done], True
            points, grad, images, rows = (part[~done] for part in (points, grad, images, rows))
            if not len(rows):
                break
        points = ball.project(ball.ascend(points, grad, alpha, norm), images, eps, norm)
    ended[rows] = points
    return ended, arrived
