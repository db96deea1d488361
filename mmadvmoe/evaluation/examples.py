"""Images before and after an attack, and the predictions of a model on both.

Dimension letters: B images, K classes, D decisions of the routers for one image (0 for a dense model).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mmadvmoe.attacks import Victim

from .chunks import AttackFunction, classify


@dataclass(frozen=True, eq=False)
class Examples:
    """B images before and after an attack. All tensors are on the CPU.

    Attributes:
        images, adversarial: Clean and attacked images, (B, 3, H, W) in [0, 1].
        label: True class, (B,) int64.
        before, after: Class predicted for the clean and for the attacked image, (B,) int64.
        route_before, route_after: Experts chosen for them, (B, D) int64, as :attr:`Routing.decisions` has them.
    """

    images: Tensor
    adversarial: Tensor
    label: Tensor
    before: Tensor
    after: Tensor
    route_before: Tensor
    route_after: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def fooled(self) -> Tensor:
        """Images that are right without the attack and wrong under it, (B,) bool."""
        return (self.before == self.label) & (self.after != self.label)

    @property
    def robust(self) -> Tensor:
        """Images that are right without the attack and under it, (B,) bool."""
        return (self.before == self.label) & (self.after == self.label)

    def take(self, rows: Tensor) -> Examples:
        """Pick images by their row."""
        return Examples(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def telling(self, count: int) -> Examples:
        """Choose up to ``count`` images: first those that are fooled, half of them if so many are, then robust ones.

        Images that are wrong without an attack come last, and only where there are too few others.
        """
        masks = (self.fooled, self.robust, self.before != self.label)
        fooled, robust, wrong = (mask.nonzero().squeeze(1) for mask in masks)
        num_fooled = max(min(len(fooled), count // 2), min(count - len(robust), len(fooled)))
        rows = torch.cat([fooled[:num_fooled], robust[: count - num_fooled], wrong])
        return self.take(rows[:count])


def attack_examples(victim: Victim, attack: AttackFunction, images: Tensor, labels: Tensor) -> Examples:
    """Attack images (B, 3, H, W) in [0, 1], and note predictions and routes before and after."""
    adversarial = attack(images, labels, seed=0)
    before, after = classify(victim, images, images), classify(victim, adversarial, images)
    parts = (images, adversarial, labels, before.prediction, after.prediction, before.expert, after.expert)
    return Examples(*(part.cpu() for part in parts))
