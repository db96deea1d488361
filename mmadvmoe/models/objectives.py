"""What a training step minimises: TRADES, adversarial cross entropy, and the reference code's router objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch.nn.functional as F
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmadvmoe.attacks import kl_divergence
from mmadvmoe.moe import Routing


@dataclass(frozen=True)
class Outputs:
    """What the network gave for one version of a batch.

    Attributes:
        logits (Tensor, optional): Class logits, (B, K); None when only the routers were run.
        routings (tuple[Routing]): One per router; empty for a dense network.
    """

    logits: Optional[Tensor]
    routings: tuple[Routing, ...] = ()


@dataclass(frozen=True)
class RobustBatch:
    """A batch as an objective sees it.

    Attributes:
        clean (Outputs): For the images as they are.
        adversarial (Outputs): For their adversarial versions.
        target (Tensor): Labels (B,) int64, or (B, K) class probabilities after batch augmentations.
        classification_loss (Callable): Maps class logits (B, K) to the loss of the classifier's head, a scalar.
    """

    clean: Outputs
    adversarial: Outputs
    target: Tensor
    classification_loss: Callable[[Tensor], Tensor]


def weight_of(name: str, value: float) -> float:
    """Give ``value`` back if it is a number of at least 0; else ValueError naming it ``name``."""
    # Written so that NaN fails too.
    if not (isinstance(value, (int, float)) and value >= 0):
        raise ValueError(f'{name}={value!r} must be a number of at least 0')
    return value


class Objective(nn.Module):
    """Base of the objectives.

    Attributes:
        needs_classes (bool): Whether class logits are used. An objective of router logits alone saves running
            the experts.
        needs_routers (bool): Whether router logits are used, so that a dense network cannot serve.
        needs_hard_labels (bool): Whether labels must be class indices, not the class probabilities that batch
            augmentations give.
    """

    needs_classes = True
    needs_routers = False
    needs_hard_labels = False

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Loss terms by name; names that contain ``loss`` are summed up and minimised."""
        raise NotImplementedError


@MODELS.register_module()
class TRADESLoss(Objective):
    r"""Classification loss of the clean images plus a weighted KL between clean and adversarial predictions.

    .. math:: L = L_{CE}(f(x), y) + \beta \cdot KL(f(x) \,\|\, f(x'))

    Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", arXiv:1901.08573, equation 5.
    Both levels of AdvMoE minimise it (arXiv:2308.10110, equation 4).

    Args:
        beta (float): Weight of the KL, at least 0. Defaults to 6.
    """

    def __init__(self, beta: float = 6.0) -> None:
        super().__init__()
        self.beta = weight_of('TRADESLoss.beta', beta)

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_natural`` and ``loss_robust``."""
        divergence = kl_divergence(batch.clean.logits, batch.adversarial.logits).mean()
        return dict(
            loss_natural=batch.classification_loss(batch.clean.logits),
            loss_robust=self.beta * divergence,
        )


@MODELS.register_module()
class AdversarialCrossEntropyLoss(Objective):
    """The head's classification loss on the adversarial images alone.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv:1706.06083, equation 2.1.
    """

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_adversarial``."""
        return dict(loss_adversarial=batch.classification_loss(batch.adversarial.logits))


@MODELS.register_module()
class RouterLabelLoss(Objective):
    r"""The router objective of the AdvMoE reference code, which differs from the paper's.

    .. math:: L = \alpha \cdot CE(r(x), y \bmod N) + \beta \cdot KL(r(x) \,\|\, r(x'))

    with r(x) the router's logits, averaged over the routers and, where it reads them, over tokens. The first term asks
    for a fixed expert per class, so every expert is used; the second keeps the route under attack.

    Args:
        alpha (float): Weight of the cross entropy, at least 0. Defaults to 6.
        beta (float): Weight of the KL, at least 0. Defaults to 6.
    """

    needs_classes = False
    needs_routers = True
    needs_hard_labels = True

    def __init__(self, alpha: float = 6.0, beta: float = 6.0) -> None:
        super().__init__()
        self.alpha = weight_of('RouterLabelLoss.alpha', alpha)
        self.beta = weight_of('RouterLabelLoss.beta', beta)

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_route_label`` and ``loss_route_robust``.

        Raises:
            ValueError: The targets are class probabilities, which name no expert.
        """
        if batch.target.dim() != 1:
            raise ValueError(
                'RouterLabelLoss needs class indices as labels, got class probabilities (gt_score) of shape '
                f'{tuple(batch.target.shape)}; use TRADESLoss as router_loss'
            )
        pairs = list(zip(batch.clean.routings, batch.adversarial.routings))
        label = sum(_label_loss(clean, batch.target) for clean, _ in pairs) / len(pairs)
        robust = sum(kl_divergence(clean.logits, adv.logits).mean() for clean, adv in pairs) / len(pairs)
        return dict(loss_route_label=self.alpha * label, loss_route_robust=self.beta * robust)


@MODELS.register_module()
class RouterKLLoss(Objective):
    r"""Keep the routers' decisions under attack: ``weight * KL(r(x) || r(x'))``, summed over the routers.

    Averaged over tokens where a router reads them. To be added to any other objective.

    Args:
        weight (float): At least 0. Defaults to 1.
    """

    needs_classes = False
    needs_routers = True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight_of('RouterKLLoss.weight', weight)

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_route_robust``."""
        pairs = list(zip(batch.clean.routings, batch.adversarial.routings))
        robust = sum(kl_divergence(clean.logits, adv.logits).mean() for clean, adv in pairs)
        return dict(loss_route_robust=self.weight * robust)


def _label_loss(routing: Routing, target: Tensor) -> Tensor:
    logits = routing.logits.float().view(len(target), -1, routing.num_experts)
    expert = (target % routing.num_experts)[:, None].expand(-1, logits.shape[1])
    return F.cross_entropy(logits.flatten(0, 1), expert.flatten())
