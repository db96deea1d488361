"""One chunk of images: the random numbers of attacks on it, and what a model makes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from mmadvmoe.attacks import Victim

from .outcomes import CLEAN, Outcome


def chunk_seed(seed: int, attack: str, chunk_index: int) -> int:
    """Mix a 32-bit seed for one attack on one chunk; the same on every machine."""
    digest = hashlib.sha256(f'{seed}/{attack}/{chunk_index}'.encode()).digest()
    return int.from_bytes(digest[:4], 'little')


@torch.no_grad()
def classify(
    victim: Victim,
    images: Tensor,
    clean: Tensor,
    name: str = CLEAN,
    place: Optional[Sequence[int]] = None,
    route: Optional[Tensor] = None,
) -> Outcome:
    """What a model makes of images.

    Args:
        victim: The model.
        images: (B, 3, H, W) in [0, 1], attacked or not.
        clean: The images without an attack, of the same shape.
        name: Name of the attack, or ``'clean'``.
        place: Place of each image in the data set, for errors. Defaults to 0, 1, ...
        route: Experts to take in place of the routers' choice, (B,) or (B, D).

    Raises:
        FloatingPointError: A logit is not finite.
    """
    with victim.frozen():
        logits, routings = victim.forward_routed(images, route)
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        rows = (~finite).nonzero().squeeze(1).tolist()
        bad = rows if place is None else [place[row] for row in rows]
        raise FloatingPointError(
            f'the logits of {len(bad)} of {len(images)} images are not finite in {name!r} '
            f'(images {bad[:10]} of the data set).'
        )
    if routings:
        expert = torch.cat([routing.decisions for routing in routings], dim=1)
    else:
        expert = torch.empty(len(images), 0, dtype=torch.int64)
    change = (images - clean).flatten(1).float()
    distance = torch.stack([change.norm(p, dim=1) for p in (torch.inf, 2, 1)], dim=1)
    attacked = torch.full((len(images),), name != CLEAN)
    return Outcome(logits.float().cpu(), expert.cpu(), distance.cpu(), attacked)
