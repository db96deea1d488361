"""Attack images that are in memory, chunk by chunk, one attack at a time.

Dimension letters: B images, K classes, D decisions of the routers for one image (0 for a dense model).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Optional

import torch
from mmengine.logging import print_log
from torch import Tensor

from mmadvmoe.attacks import Victim

from .chunks import chunk_seed
from .outcomes import Outcome

#: ``attack(images, labels, seed=...) -> adversarial images``
Attack = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, and the chunks in which they are attacked.

    Attributes:
        images: (B, 3, H, W) in [0, 1].
        labels: True classes, (B,) int64.
        chunk_size: Images attacked at a time.
        seed: What an attack draws is a function of this, its name and the number of the chunk.
    """

    images: Tensor
    labels: Tensor
    chunk_size: int = 128
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def chunks(self) -> Iterator[slice]:
        """The rows of each chunk."""
        for start in range(0, len(self), self.chunk_size):
            yield slice(start, min(start + self.chunk_size, len(self)))

    def attacked(self, name: str, attack: Attack) -> Tensor:
        """Attack all images.

        Args:
            name: Name of the attack, for its seeds and for the log.
            attack: The attack.

        Returns:
            Adversarial images, (B, 3, H, W).

        Raises:
            RuntimeError: The attack fails; the message names it and the images.
        """
        parts = []
        for index, rows in enumerate(self.chunks()):
            started = time.monotonic()
            try:
                part = attack(self.images[rows], self.labels[rows], seed=chunk_seed(self.seed, name, index))
            except Exception as error:
                raise RuntimeError(
                    f'attack {name!r} failed on images {rows.start} to {rows.stop - 1}: {type(error).__name__}: {error}'
                ) from error
            parts.append(part)
            print_log(
                f'{name}: {rows.stop} of {len(self)} images, {time.monotonic() - started:.1f} s',
                logger='current',
                level=logging.INFO,
            )
        return torch.cat(parts)


@torch.no_grad()
def classify(
    victim: Victim, images: Tensor, clean: Tensor, route: Optional[Tensor] = None, batch: int = 128
) -> Outcome:
    """What a model makes of images.

    Args:
        victim: The model.
        images: (B, 3, H, W) in [0, 1].
        clean: The images without an attack, of the same shape.
        route: Experts to take in place of the routers' choice, (B,) or (B, D).
        batch: Images at a time.

    Raises:
        FloatingPointError: A logit is not finite.
    """
    logits, experts = [], []
    with victim.frozen():
        for start in range(0, len(images), batch):
            rows = slice(start, start + batch)
            given = None if route is None else route[rows].to(images.device)
            part, routings = victim.forward_routed(images[rows], given)
            decisions = [routing.decisions for routing in routings] or [torch.empty(len(part), 0, dtype=torch.int64)]
            logits.append(part.float().cpu())
            experts.append(torch.cat(decisions, dim=1).cpu())
    logits = torch.cat(logits)
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        rows = (~finite).nonzero().squeeze(1).tolist()
        raise FloatingPointError(f'the logits of {len(rows)} of {len(images)} images are not finite (rows {rows[:10]})')
    change = (images - clean).flatten(1).float()
    distance = torch.stack([change.norm(p, dim=1) for p in (torch.inf, 2, 1)], dim=1).cpu()
    return Outcome(logits, torch.cat(experts), distance, attacked=torch.ones(len(images), dtype=torch.bool))
