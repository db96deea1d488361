"""Objectives of other methods of adversarial training, to compare with."""

from __future__ import annotations

import torch
from mmpretrain.registry import MODELS
from torch import Tensor

from mmadvmoe.attacks import kl_divergence

from .objectives import Objective, RobustBatch

# Keeps the logarithms finite where a probability is exactly 0 or 1.
_TINY = 1e-12


@MODELS.register_module()
class MARTLoss(Objective):
    r"""Misclassification-aware adversarial training.

    .. math:: L = CE(f(x'), y) - \log(1 - \max_{k \ne y} p_k(x')) + \lambda \cdot KL(f(x) \,\|\, f(x')) (1 - p_y(x))

    The second term is the margin of the boosted cross entropy; the KL counts most for images that are misclassified
    without any attack. Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
    ICLR 2020, equations 10 and 11. Its training attack is PGD on the cross entropy:
    ``attack=dict(type='PGD', ...)``.

    Args:
        weight (float): Lambda, at least 0. Defaults to 5.

    Raises:
        ValueError: ``weight`` is negative or no number.
    """

    needs_hard_labels = True

    def __init__(self, weight: float = 5.0) -> None:
        super().__init__()
        if not (isinstance(weight, (int, float)) and weight >= 0):
            raise ValueError(f'MARTLoss.weight={weight!r} must be a number of at least 0')
        self.weight = weight

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_adversarial``, ``loss_margin`` and ``loss_robust``.

        Raises:
            ValueError: The targets are class probabilities, which name no true class.
        """
        if batch.target.dim() != 1:
            raise ValueError(
                'MARTLoss needs hard labels: it cannot serve batch augmentations that mix them (train_cfg.augments) or '
                'gt_score; use TRADESLoss as robust_loss'
            )
        clean, adversarial = batch.clean.logits, batch.adversarial.logits
        true_class = batch.target[:, None]
        others = adversarial.float().softmax(dim=1).scatter(1, true_class, 0.0)
        margin = -torch.log((1 - others.amax(dim=1)).clamp(min=_TINY))
        doubt = 1 - clean.float().softmax(dim=1).gather(1, true_class).squeeze(1)
        return dict(
            loss_adversarial=batch.classification_loss(adversarial),
            loss_margin=margin.mean(),
            loss_robust=self.weight * (kl_divergence(clean, adversarial) * doubt).mean(),
        )
