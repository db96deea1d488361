"""Run a classifier and keep what its routers decided."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor, nn

from .routing import Routing


def forward_routed(
    classifier: nn.Module,
    inputs: Tensor,
    route: Optional[Tensor] = None,
    with_logits: bool = False,
    gated: bool = True,
) -> tuple[Any, tuple[Routing, ...]]:
    """Class logits of an MMPretrain classifier, and the decisions that led to them.

    Args:
        classifier (nn.Module): Has ``backbone``, ``head`` and perhaps ``neck``, as ``ImageClassifier`` has.
        inputs (Tensor): Network inputs, (B, C, H, W).
        route (Tensor, optional): See :meth:`MoEBackbone.forward_routed`.
        with_logits (bool): See :meth:`MoEBackbone.forward_routed`.
        gated (bool): See :meth:`MoEBackbone.forward_routed`.

    Returns:
        tuple: What the head gives, for most heads (B, K) logits, and one :class:`Routing` per router, none for a
        dense network.

    Raises:
        ValueError: A route is given to a network without routers.
    """
    if getattr(classifier.backbone, 'num_routers', 0):
        features, routings = classifier.backbone.forward_routed(inputs, route, with_logits, gated)
    elif route is not None:
        raise ValueError(f'a route was given, but {type(classifier.backbone).__name__} has no router')
    else:
        features, routings = classifier.backbone(inputs), ()
    if getattr(classifier, 'neck', None) is not None:
        features = classifier.neck(features)
    return classifier.head(features), routings
