"""Views of a model: the model as an attack uses it, whole or with one thing changed.

Dimension letters: B images, K classes, N experts, L routers, D decisions of an image (one per router; of routers for
tokens, one per choice of each token).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmadvmoe.moe import BaseRouting, Route, Routing
from mmadvmoe.utils import bare_model

from .model import NormalizedClassifier

#: ``'gate'``: the routers decide, as in use. ``'held'``: each image keeps the route of its clean version.
ROUTES = ('gate', 'held')


class Victim:
    """A model as an attack uses it: images in [0, 1] to logits, the routes beside them, frozen on demand.

    A view is no ``nn.Module``, so the data preprocessor of a classifier can hold a view of that classifier as a plain
    attribute. A deep copy of the classifier then holds a view of the copy.

    Args:
        model (nn.Module or Victim): What is looked at: a :class:`NormalizedClassifier`; another view; or a classifier,
            which becomes a ``NormalizedClassifier`` with the other arguments.
        preprocessor (nn.Module, optional): See :class:`NormalizedClassifier`.
        num_classes (int, optional): See :class:`NormalizedClassifier`.

    Raises:
        TypeError: See :class:`NormalizedClassifier`; or a preprocessor is given to what has its own.
        ValueError: ``num_classes`` is not that of a model which is a view or ``NormalizedClassifier`` already.
    """

    def __init__(
        self, model: nn.Module | Victim, preprocessor: nn.Module | None = None, num_classes: int | None = None
    ) -> None:
        model = model if isinstance(model, Victim) else bare_model(model)
        if not isinstance(model, (NormalizedClassifier, Victim)):
            model = NormalizedClassifier(model, preprocessor, num_classes)
        elif preprocessor is not None:
            raise TypeError(f'preprocessor: a {type(model).__name__} normalises by itself; give its classifier instead')
        elif num_classes not in (None, model.num_classes):
            raise ValueError(
                f'num_classes={num_classes}, but the {type(model).__name__} has num_classes={model.num_classes}; give '
                'num_classes to the NormalizedClassifier, or leave it out'
            )
        self._base = model
        self.model.check_routes_are_seen()

    def __repr__(self) -> str:
        return f'{type(self).__name__}({type(self.classifier).__name__})'

    @property
    def model(self) -> NormalizedClassifier:
        """The model with its normalisation."""
        return self._base if isinstance(self._base, NormalizedClassifier) else self._base.model

    @property
    def classifier(self) -> nn.Module:
        """The classifier without it."""
        return self.model.classifier

    @property
    def num_classes(self) -> int | None:
        """K, or None where neither the head nor the backbone knows."""
        return self._base.num_classes

    @property
    def num_experts(self) -> int:
        """N; 1 for a dense model."""
        return self._base.num_experts

    @property
    def num_routers(self) -> int:
        """L; 0 for a dense model."""
        return self._base.num_routers

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of ``images`` (B, C, H, W) in [0, 1]."""
        return self._base(images)

    def forward_routed(
        self, images: Tensor, route: Route | None = None, with_logits: bool = True, gated: bool = True
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """See :meth:`NormalizedClassifier.forward_routed`."""
        return self._base.forward_routed(images, route, with_logits, gated)

    def decide_routes(self, images: Tensor) -> tuple[Routing, ...]:
        """See :meth:`NormalizedClassifier.decide_routes`."""
        if not self.num_routers:
            raise ValueError('there is no router, so there is no route to look at')
        return self._base.decide_routes(images)

    @contextmanager
    def frozen(self) -> Iterator[Victim]:
        """See :meth:`NormalizedClassifier.frozen`."""
        with self.model.frozen():
            yield self

    # Of a module, as much as the attacks of torchattacks use.

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the model."""
        return self.model.parameters()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the model."""
        return self.model.named_modules()

    @property
    def training(self) -> bool:
        """Whether the classifier is in training mode."""
        return self.classifier.training

    def train(self, mode: bool = True) -> Victim:
        """Put the model into training or eval mode."""
        self.model.train(mode)
        return self

    def eval(self) -> Victim:
        """Put the model into eval mode."""
        return self.train(False)


class _OneRoute(Victim):
    """Base of views that take one route whatever they are shown.

    The routings of the last pass are taken again where a batch has as many images, so that no step of an attack waits
    for the device to count them, but where a capacity drops tokens.
    """

    def __init__(self, model: nn.Module | Victim) -> None:
        super().__init__(model)
        self._kept: tuple[BaseRouting, ...] = ()

    def _forward_alike(
        self, images: Tensor, route: Tensor, with_logits: bool, gated: bool
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Logits and routings of images (B, C, H, W) that all take ``route`` (B,) or (B, D)."""
        kept = self._kept
        taken = kept if kept and len(kept[0].expert) == len(images) else route
        logits, routings = self._base.forward_routed(images, taken, with_logits, gated)
        # Where (B,) leaves a choice, of second experts, it can fall on others in the next pass.
        settled = route.dim() > 1 or all(routing.top_k == 1 for routing in routings)
        self._kept = tuple(routing.detach() for routing in routings) if settled else ()
        return logits, routings


class HeldVictim(_OneRoute):
    """A mixture of experts that takes one route for whatever it is shown: any attack can be run with the route held.

    Args:
        model (nn.Module or Victim): The mixture, whose routers decide.
        route (Tensor): The decisions of one image, (D,) int64.
    """

    def __init__(self, model: nn.Module | Victim, route: Tensor) -> None:
        super().__init__(model)
        self.route = route

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of the pathway that the held route is."""
        return self.forward_routed(images, with_logits=False)[0]

    def forward_routed(
        self, images: Tensor, route: Route | None = None, with_logits: bool = True, gated: bool = True
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """See :meth:`NormalizedClassifier.forward_routed`; where no route is given the held one is taken."""
        if route is None:
            return self._forward_alike(images, self.route.expand(len(images), -1), with_logits, gated)
        return super().forward_routed(images, route, with_logits, gated)


class Pathway(_OneRoute):
    """The network that is left of a mixture when one expert computes everything.

    To an attack it is a model without routers, so any attack finds what this expert does wrong and nothing of what
    the routers do wrong.

    Args:
        model (nn.Module or Victim): The mixture.
        expert (int): In [0, N). All routers are overruled; with token-level routing and top K > 1, each token takes
            this expert and the K - 1 others that its router likes best.

    Raises:
        ValueError: The model has no routers, or no such expert.
    """

    num_experts = 1
    num_routers = 0

    def __init__(self, model: nn.Module | Victim, expert: int) -> None:
        super().__init__(model)
        if not self._base.num_routers:
            raise ValueError('a pathway is one of several in a mixture of experts, but this model has no routers')
        if not 0 <= expert < self._base.num_experts:
            raise ValueError(f'expert={expert} does not exist; allowed: 0 to {self._base.num_experts - 1}')
        self.expert = expert

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of ``images`` (B, C, H, W) in [0, 1]."""
        route = torch.full((len(images),), self.expert, device=images.device)
        return self._forward_alike(images, route, with_logits=False, gated=False)[0]

    def forward_routed(
        self, images: Tensor, route: None = None, with_logits: bool = True, gated: bool = True
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Logits, and no decisions, for there are none to take.

        Raises:
            ValueError: A route is given to what has one already.
        """
        if route is not None:
            raise ValueError('a route was given to a pathway, which is one already')
        return self(images), ()


class Rescaled(Victim):
    """A model whose class logits are divided by a constant, which changes no prediction.

    Where logits are so large that the softmax leaves no gradient, an attack on the cross entropy of this view finds
    what it cannot find on the model itself.

    Args:
        model (nn.Module or Victim): The model.
        scale (float): What its logits are divided by, above 0.

    Raises:
        ValueError: ``scale`` is not above 0.
    """

    def __init__(self, model: nn.Module | Victim, scale: float) -> None:
        super().__init__(model)
        if not scale > 0:
            raise ValueError(f'scale={scale!r} must be above 0')
        self.scale = scale

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, K) of ``images`` (B, C, H, W) in [0, 1]."""
        return super().__call__(images) / self.scale

    def forward_routed(
        self, images: Tensor, route: Route | None = None, with_logits: bool = True, gated: bool = True
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """See :meth:`NormalizedClassifier.forward_routed`; the logits of the routers are as they were."""
        logits, routings = super().forward_routed(images, route, with_logits, gated)
        return logits / self.scale, routings


def decisions(routings: Sequence[BaseRouting], images: Tensor) -> Tensor:
    """The decisions of all routers on B images side by side, (B, D) int64: a route that can be given to the model."""
    none = torch.empty(len(images), 0, dtype=torch.int64, device=images.device)
    return torch.cat([none, *(routing.decisions for routing in routings)], dim=1)


def in_spreads(margin: Tensor, logits: Tensor) -> Tensor:
    """A margin (B, T) of router logits (B, T, N) in units of their spread, which has no gradient.

    So neither huge nor tiny logits decide: logits of 1e18 times a weight of 1e18 would not fit a float32 gradient.
    """
    spread = (logits.amax(2) - logits.amin(2)).detach()
    return margin / torch.where(spread > 0, spread, torch.ones_like(spread))


@torch.no_grad()
def clean_route(victim: Victim, images: Tensor) -> Tensor:
    """The decisions of the routers on ``images`` (B, C, H, W): (B, D) int64."""
    return decisions(victim.decide_routes(images), images)
