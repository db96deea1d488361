"""Losses of the network on clean and adversarial images, and the check that losses are finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from mmengine.logging import MessageHub
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmadvmoe.attacks import kl_divergence
from mmadvmoe.moe import Routing

#: What errors call the logits of the routers.
ROUTER_LOGITS = 'router logits'
# Keeps logarithms finite where a probability is exactly 0 or 1.
_TINY = 1e-12


@dataclass(frozen=True)
class Outputs:
    """Outputs of the network for one version of a batch.

    Attributes:
        logits (Tensor, optional): Class logits, (B, K); None when only the routers were run.
        routings (tuple[Routing]): One per router; empty for a dense network.
    """

    logits: Tensor | None
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


def check_weight(name: str, value: float) -> float:
    """Give ``value`` back if it is a number of at least 0; else raise ValueError, naming it ``name``."""
    # Written so that NaN fails too.
    if not (isinstance(value, (int, float)) and value >= 0):
        raise ValueError(f'{name}={value!r} must be a number of at least 0')
    return value


def check_hard_labels(name: str, target: Tensor) -> None:
    """Raise ValueError if the labels of a batch are class probabilities, which name no true class."""
    if target.dim() != 1:
        raise ValueError(
            f'{name} needs hard labels, class indices, got class probabilities of shape {tuple(target.shape)} '
            '(gt_score, or batch augmentations that mix labels, train_cfg.augments); use TRADESLoss'
        )


class Objective(nn.Module):
    """Base of the losses of a :class:`RobustClassifier`.

    Attributes:
        needs_classes (bool): Whether class logits are used. Without, the experts are not run.
        needs_routers (bool): Whether router logits are used, so that a dense network cannot serve.
        needs_hard_labels (bool): Whether labels must be class indices, not the probabilities of batch augmentations.
    """

    needs_classes = True
    needs_routers = False
    needs_hard_labels = False

    def check_model(self, num_experts: int, num_classes: int | None) -> None:
        """Raise ValueError if the objective does not fit a model with N experts and K classes."""

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
        self.beta = check_weight('TRADESLoss.beta', beta)

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_natural`` and ``loss_robust``."""
        divergence = kl_divergence(batch.clean.logits, batch.adversarial.logits).mean()
        natural = batch.classification_loss(batch.clean.logits)
        return dict(loss_natural=natural, loss_robust=self.beta * divergence)


@MODELS.register_module()
class AdversarialCrossEntropyLoss(Objective):
    """The head's classification loss on the adversarial images alone.

    Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv:1706.06083, equation 2.1.
    """

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_adversarial``."""
        return dict(loss_adversarial=batch.classification_loss(batch.adversarial.logits))


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
    """

    needs_hard_labels = True

    def __init__(self, weight: float = 5.0) -> None:
        super().__init__()
        self.weight = check_weight('MARTLoss.weight', weight)

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_adversarial``, ``loss_margin`` and ``loss_robust``; ValueError for soft labels."""
        check_hard_labels('MARTLoss', batch.target)
        clean, adversarial = batch.clean.logits, batch.adversarial.logits
        true_class = batch.target[:, None]
        others = adversarial.float().softmax(dim=1).scatter(1, true_class, 0.0)
        margin = -torch.log((1 - others.amax(dim=1)).clamp(min=_TINY))
        unlike_true = 1 - clean.float().softmax(dim=1).gather(1, true_class).squeeze(1)
        return dict(
            loss_adversarial=batch.classification_loss(adversarial),
            loss_margin=margin.mean(),
            loss_robust=self.weight * (kl_divergence(clean, adversarial) * unlike_true).mean(),
        )


class NonFiniteError(FloatingPointError):
    """A loss, a router logit or a gradient of a training step is NaN or infinite.

    Args:
        what (str): Names the values.
        turn (str, optional): Whose turn it is, where training takes turns.
        group (str, optional): The parameters concerned, ``'experts'`` or ``'router'``. Defaults to None: those of the
            turn, or all.
    """

    def __init__(self, what: str, turn: str | None = None, group: str | None = None) -> None:
        iteration = MessageHub.get_current_instance().get_info('iter')
        where = '' if iteration is None else f' at iteration {iteration + 1}'
        whose = '' if turn is None else f' in a turn of the {turn}'
        group = group or turn
        key = 'optim_wrapper' if group is None else f'optim_wrapper.{group}'
        joint = '' if group is None else '; in joint training optim_wrapper alone'
        gate = ', or gate="softmax" in MoEBackbone' if group == 'router' else ''
        super().__init__(
            f'not finite{where}: {what}{whose}. Training was stopped before the weights were touched. Try a smaller '
            f'learning rate ({key}.optimizer.lr), clipping of gradients ({key}.clip_grad=dict(max_norm=...){joint}), '
            f'or longer warm-up{gate}'
        )


def check_finite(
    losses: Mapping[str, Tensor | Sequence[Tensor]], routings: Sequence[Routing] = (), turn: str | None = None
) -> None:
    """Check loss terms, as a ``loss()`` returns them, and the logits of routings, where they have any.

    It costs one transfer from the device.

    Raises:
        NonFiniteError: A value is NaN or infinite; names the iteration, the turn and all values concerned.
    """
    terms = ((name, [term] if isinstance(term, Tensor) else term) for name, term in losses.items())
    values = [(name, value) for name, term in terms for value in term]
    values += [(ROUTER_LOGITS, routing.logits) for routing in routings if routing.logits is not None]
    finite = torch.stack([value.detach().isfinite().all() for _, value in values]).tolist() if values else []
    wrong = [name for (name, _), is_finite in zip(values, finite) if not is_finite]
    if wrong:
        raise NonFiniteError(', '.join(dict.fromkeys(wrong)), turn, 'router' if ROUTER_LOGITS in wrong else None)
