"""Attacks on the routers alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmadvmoe.moe import ClassGroups
from mmadvmoe.moe.class_groups import MODULO, Groups
from mmadvmoe.registry import ATTACKS

from .steps import BallAttack
from .views import Victim, decisions, in_spreads


class _OnRouters(BallAttack):
    """Base of attacks on the routers."""

    # Which routes are taken is its own business.
    own_routes = True

    def _check_model(self, model: Victim) -> None:
        if not isinstance(model, Victim):
            raise TypeError(f'{type(self).__name__} attacks a Victim, got {type(model).__name__}')
        if not model.num_routers:
            raise ValueError(
                f'{type(self).__name__} attacks the routers of a mixture of experts, but the model has none'
            )


@ATTACKS.register_module()
class RouterAttack(_OnRouters):
    """Change the route of each image as far as the ball allows; the class does not matter.

    Projected steepest ascent on the margin by which routers prefer an expert other than the clean one. As long as a
    router (of routers for tokens, the decision on a token) keeps its clean choice, only those that do are pushed;
    once all have changed, all are pushed further away. Margins are measured in the spread of the logits they come
    from, so neither huge nor tiny logits hide anything. Of all points on the way each image gets the one where most
    decisions have changed, and among equals the one with the largest mean margin.

    With image-level routing only the router is run.

    Arguments are those of :class:`BallAttack`. Images whose decisions have all changed are in no further restart.

    Raises:
        TypeError: The model is not a :class:`Victim`.
        ValueError: The model has no router, ``norm`` is unknown, or there are restarts without a random start.
    """

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The point with the most changed decisions that was found for each image; labels are not used."""
        images = images.detach().to(self.device)
        with torch.no_grad():
            clean = decisions(self.model.decide_routes(images), images)
        best = images.clone()
        # Share of changed decisions and mean margin of the best point.
        changed, margin = (images.new_full((len(images),), -torch.inf) for _ in range(2))

        def note_best(points: Tensor, rows: Tensor) -> Tensor:
            """Margins (b, D) of ``points``, which are noted where they are the best so far."""
            margins = _margins(self.model.decide_routes(points), clean[rows])
            share, mean = (margins.detach() > 0).to(images).mean(1), margins.detach().to(images).mean(1)
            # Written so that a margin that is no number shows in the images.
            better = (share > changed[rows]) | (share == changed[rows]) & ~(mean <= margin[rows])
            where = rows[better]
            best[where], changed[where], margin[where] = points.detach()[better], share[better], mean[better]
            return margins

        for _ in range(self.restarts):
            start = self._start(images)
            remaining = (changed < 1).nonzero().squeeze(1)
            if not len(remaining):
                break

            def gradient(points: Tensor, rows: Tensor, remaining: Tensor = remaining) -> tuple[Tensor, None]:
                margins = note_best(points, remaining[rows])
                kept = margins <= 0
                pushed = margins.where(kept | ~kept.any(1, keepdim=True), torch.zeros_like(margins))
                (grad,) = torch.autograd.grad(pushed.sum(), points)
                return grad, None

            points, _ = self._climb(gradient, start[remaining], images[remaining])
            with torch.no_grad():
                note_best(points, remaining)
        return best


@ATTACKS.register_module()
class ClassGroupAttack(_OnRouters):
    """Maximise the cross entropy of the routers' logits with the group of the class, by projected steepest ascent.

    The attack of a router's turn that minimises :class:`mmadvmoe.models.ClassGroupLoss`; both get the same ``groups``.
    With image-level routing only the router is run.

    Args:
        model (Victim): The attacked mixture.
        groups, classes: See :class:`mmadvmoe.moe.ClassGroups`.
        steps (int): Defaults to 4.
        eps, alpha, random_start, norm: See :class:`BallAttack`.

    Raises:
        TypeError: The model is not a :class:`Victim`.
        ValueError: The model has no router, or the groups or ``norm`` are not allowed.
    """

    # Class probabilities do for labels.
    soft_labels = True

    def __init__(
        self,
        model: Victim,
        groups: Groups = MODULO,
        classes: None | str | Sequence[str] = None,
        eps: float = 8 / 255,
        alpha: float = 4 / 255,
        steps: int = 4,
        random_start: bool = True,
        norm: str = 'Linf',
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start, norm)
        self.groups = ClassGroups(groups, classes)
        self.groups.check(model.num_experts, model.num_classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Where the run ended, for labels (B,) or class probabilities (B, K)."""
        images, labels = images.detach().to(self.device), labels.to(self.device)

        def gradient(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            loss = self.groups.cross_entropy(self.model.decide_routes(points), labels[rows]).sum()
            return torch.autograd.grad(loss, points)[0], None

        return self._climb(gradient, self._start(images), images)[0]


def _margins(routings: Sequence, clean: Tensor) -> Tensor:
    """By how much each decision prefers another expert to its clean one, (B, L) or (B, L * T) for tokens.

    Positive where the decision has changed. For top K the least liked of the clean experts against the best liked of
    the others. In units of the spread of the logits.
    """
    margins, start = [], 0
    for routing in routings:
        width = routing.decisions.shape[1]
        logits = routing.token_logits.float()
        chosen = clean[:, start : start + width].view(*logits.shape[:2], routing.top_k)
        start += width
        is_clean = torch.zeros_like(logits, dtype=torch.bool).scatter(2, chosen, True)
        stay = logits.masked_fill(~is_clean, torch.inf).amin(2)
        leave = logits.masked_fill(is_clean, -torch.inf).amax(2)
        margins.append(in_spreads(leave - stay, logits))
    return torch.cat(margins, dim=1)
