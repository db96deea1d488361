"""PGD that knows about routes, by which the robustness of a mixture of experts is measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmadvmoe.registry import ATTACKS

from .steps import Ascent, BallAttack, by_largest_entry
from .views import Victim, decisions, in_spreads


@ATTACKS.register_module()
class RoutePGD(BallAttack):
    """PGD with the route held, and PGD at every route in turn.

    The gate of a hard router adds a gradient that says nothing about the image and can drown the one that does. So no
    gradient goes through a gate here. The runs are:

    1. the route held at the clean one: the cross entropy of that pathway is maximised;
    2. for each expert j: the cross entropy of pathway j is maximised *and* the routers are pushed to j (with
       layer-level routing, pathway j is expert j in every layer).

    With token-level routing, holding a route holds the experts of every token in every layer, and pathway j takes each
    token to j (with top K > 1 to j and to those K - 1 others that the router likes best). The weights of the experts
    are part of what the network computes, so they move and have their gradient, as far as it is not that of a
    straight-through gate. As single tokens change their experts all the time, there is a further run, in which each
    step holds the route of its own point.

    The push maximises the margin of j's logit over the best other one (the Kth best for top K), of each router, or
    token, that does not choose j yet. Margin and cross entropy are made comparable image by image, each gradient
    divided by its own L1 norm, so that neither huge nor tiny router logits hide anything.

    What counts is the prediction of the whole model with its own routers. Where all of them choose the given route the
    pathway's logits *are* that prediction, which is looked up at each step for free; the last point of each run is
    checked with a forward pass of its own, and with token-level routing, where hardly an image has all its tokens
    follow, every point is. An image is robust when it survives all runs; a fooled one is not attacked any further.
    Images that are misclassified as they are come back unchanged. N + 1 runs of ``steps`` steps (N + 2 with token-level
    routing); on a model without routers it is one run of PGD (arXiv:1706.06083) by these rules.

    To train on such images is friendly adversarial training (arXiv:2002.11242): wrong ones are learned as they are,
    others from where they first fool. With ``stop_at_first=False`` every image makes all steps of all runs instead, and
    comes back from the end of that run after which the model prefers another class to its label by most.

    Args:
        model, eps, alpha, steps, random_start, norm, restarts: See :class:`BallAttack`.
        stop_at_first (bool): Leave an image alone once it fools the model. Defaults to True.

    Raises:
        TypeError: The model is not a :class:`Victim`, or does not tell its routes as one does.
        ValueError: ``norm`` is unknown, or there are restarts without a random start.
    """

    # Which routes are taken is its own business.
    own_routes = True

    def __init__(
        self,
        model: Victim,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 50,
        random_start: bool = True,
        norm: str = 'Linf',
        restarts: int = 1,
        stop_at_first: bool = True,
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start, norm, restarts)
        self.stop_at_first = stop_at_first

    def _check_model(self, model: Victim) -> None:
        if not hasattr(model, 'forward_routed'):
            raise TypeError(f'RoutePGD attacks a Victim, got {type(model).__name__}')

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The first adversarial image found for each of ``images`` in [0, 1], or where the last run ended."""
        images, labels = images.detach().to(self.device), labels.to(self.device)
        with torch.no_grad():
            logits, routings = self.model.forward_routed(images)
        adversarial, worst = images.clone(), torch.full_like(logits[:, 0], -torch.inf)
        left = torch.arange(len(images), device=self.device)
        if self.stop_at_first:
            left = left[logits.argmax(1) == labels]
        for route, push in self.restarts * list(self._runs(routings, images)):
            start = self._start(images)
            if not len(left):
                break
            given = None if route is None else route[left]
            found, fooled = self._climb(self._ascent(labels[left], given, push), start[left], images[left])
            rest = (~fooled).nonzero().squeeze(1)
            if len(rest):
                with torch.no_grad():
                    logits = self.model(found[rest])
                fooled[rest] = logits.argmax(1) != labels[left[rest]]
            if self.stop_at_first:
                adversarial[left] = found
                left = left[~fooled]
                continue
            label = labels[:, None]
            margin = (logits.scatter(1, label, -torch.inf).amax(1) - logits.gather(1, label).squeeze(1)).to(worst)
            adversarial[margin > worst] = found[margin > worst]
            worst = worst.maximum(margin)
        return adversarial

    def _runs(self, routings: tuple, images: Tensor) -> Iterator[tuple[Tensor | None, bool]]:
        """The route of each run, (B,), (B, D) or None for the model's own, and whether to push there."""
        if routings:
            yield decisions(routings, images), False
        if not routings or _of_tokens(routings):
            yield None, False
        if not routings:
            return
        for expert in range(self.model.num_experts):
            yield torch.full((len(images),), expert, device=self.device), True

    def _ascent(self, labels: Tensor, route: Tensor | None, push: bool) -> Ascent:
        """What one run climbs, and where it stops."""

        def ascent(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
            target, given = labels[rows], None if route is None else route[rows]
            logits, routings = self.model.forward_routed(points, route=given, gated=False)
            certain = _followed(routings, given, logits)
            hit = None
            if self.stop_at_first:
                hit = (logits.argmax(1) != target) & certain
                if _of_tokens(routings) and not certain.all():
                    with torch.no_grad():
                        hit[~certain] = self.model(points[~certain]).argmax(1) != target[~certain]
                if hit.all():
                    return torch.zeros_like(points), hit
            (grad,) = torch.autograd.grad(F.cross_entropy(logits, target, reduction='sum'), points, retain_graph=push)
            if push and not certain.all():
                (to_route,) = torch.autograd.grad(_margins(routings, given), points)
                grad = _unit(grad) + _unit(to_route)
            return grad, hit

        return ascent


class ForcedRoutePGD(RoutePGD):
    """Push the routers to one ``expert``, in [0, N), and attack it: one of the runs of :class:`RoutePGD`."""

    def __init__(self, model: Victim, expert: int, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.expert = expert

    def _runs(self, routings: tuple, images: Tensor) -> Iterator[tuple[Tensor | None, bool]]:
        yield torch.full((len(images),), self.expert, device=self.device), True


def _of_tokens(routings: tuple) -> bool:
    return any(routing.of_tokens for routing in routings)


def _followed(routings: tuple, route: Tensor | None, logits: Tensor) -> Tensor:
    """(B,): whether all routers choose the given route by themselves, so that ``logits`` are the model's own."""
    if route is None:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    return torch.cat([routing.followed for routing in routings], dim=1).all(1)


def _margins(routings: tuple, route: Tensor) -> Tensor:
    """Sum, over the routers that do not follow, of the wanted logit minus its best rival's.

    Each is in units of the spread of its logits. Of a router for tokens it is the mean over the tokens.
    """
    total = 0.0
    for routing in routings:
        logits = routing.token_logits.float()
        tokens = logits.shape[1]
        target = route[:, None, None].expand(-1, tokens, 1)
        wanted = logits.gather(2, target).squeeze(2)
        rival = logits.scatter(2, target, -torch.inf).topk(routing.top_k, dim=2).values[..., -1]
        margin = in_spreads(wanted - rival, logits)
        total = total + margin[~routing.followed].sum() / tokens
    return total


def _unit(grad: Tensor) -> Tensor:
    """Each image's gradient at L1 norm 1; zero stays zero."""
    flat = by_largest_entry(grad).flatten(1)
    return (flat / flat.abs().sum(1, keepdim=True).clamp(min=1)).view_as(grad)
