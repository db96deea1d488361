"""torchattacks' APGD and APGDT, in L1 as well.

In L1 the method is another one than in L-inf and L2: Croce & Hein, "Mind the box: l1-APGD for sparse adversarial
attacks on image classifiers", arXiv:2103.01208. Steps move some coordinates only, as many as the best point so far has
moved and fewer; a run begins in a ball three times as large and is brought in twice.

Dimension letters: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchattacks
from torch import Tensor

from mmadvmoe.attacks import steps as ball
from mmadvmoe.registry import ATTACKS

#: ``loss(logits, rows) -> (b,)``, to be maximised, of the images in these rows of the batch.
Loss = Callable[[Tensor, Tensor], Tensor]

#: The share of the iterations that each of the two larger radii of a run gets, 3 eps and 2 eps.
_EARLY = 0.3
#: After this share of the iterations step and sparsity are looked at again.
_PERIOD = 0.04
#: A point that has kept this share of its moved coordinates has stopped to grow sparser.
_SETTLED = 0.95
_STEP_DECAY, _SHORTEST_STEP = 1.5, 0.1
#: A step moves that many times fewer coordinates than the best point has moved.
_SPARSER = 1.5


@ATTACKS.register_module()
class APGD(torchattacks.APGD):
    """Auto-PGD on the cross entropy or on the difference of logits ratio (Croce & Hein, arXiv:2003.01690).

    As torchattacks has it in L-inf and L2, and with ``norm='L1'`` the sparse form of arXiv:2103.01208, whose budget of
    iterations is spent on three radii.

    Args:
        model (Victim): The attacked model.
        norm (str): ``'Linf'``, ``'L2'`` or ``'L1'``. Defaults to ``'Linf'``.
        eps (float): Radius of the ball, on [0, 1] images. Defaults to 8/255.
        steps (int): Iterations of a run. Defaults to 10.
        n_restarts (int): Runs; an image that one fools is in no further one. Defaults to 1.
        seed (int): Where random starts come from. A seed given in the call overrules it.
        loss (str): ``'ce'`` or ``'dlr'``. Defaults to ``'ce'``.
        eot_iter (int): Passes that a gradient is averaged over. Defaults to 1.
        rho (float): When steps are halved; not in L1. Defaults to 0.75.
        verbose (bool): Print the progress; not in L1. Defaults to False.
    """

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """An adversarial image for each image that is fooled; the others as they are.

        Args:
            images (Tensor): (B, C, H, W) in [0, 1].
            labels (Tensor): (B,) int64.
        """
        if self.norm != 'L1':
            return super().forward(images, labels)
        labels = labels.to(self.device)

        def loss(logits: Tensor, rows: Tensor) -> Tensor:
            if self.loss == 'ce':
                return F.cross_entropy(logits, labels[rows], reduction='none')
            return self.dlr_loss(logits, labels[rows])

        return _attack_l1(self, images.detach().to(self.device), labels, [loss])


@ATTACKS.register_module()
class APGDT(torchattacks.APGDT):
    """Auto-PGD towards each of the most likely wrong classes, on the targeted difference of logits ratio.

    Args:
        model (Victim): The attacked model.
        norm (str): ``'Linf'``, ``'L2'`` or ``'L1'``; see :class:`APGD`. Defaults to ``'Linf'``.
        eps (float): Radius of the ball, on [0, 1] images. Defaults to 8/255.
        steps (int): Iterations for each class. Defaults to 10.
        n_restarts (int): Runs for each class; an image that one fools is in no further one. Defaults to 1.
        seed (int): Where random starts come from. A seed given in the call overrules it.
        eot_iter (int): Passes that a gradient is averaged over. Defaults to 1.
        rho (float): When steps are halved; not in L1. Defaults to 0.75.
        verbose (bool): Print the progress; not in L1. Defaults to False.
        n_classes (int): K, of which K - 1 are tried; ``build_attack`` knows it. Defaults to 10.
    """

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """As :meth:`APGD.forward`."""
        if self.norm != 'L1':
            return super().forward(images, labels)
        images, labels = images.detach().to(self.device), labels.to(self.device)
        with torch.no_grad():
            order = self.get_logits(images).argsort(dim=1, descending=True)
        # Class by class down from the most likely one, without the true one.
        wrong = order[order != labels[:, None]].view(len(images), -1)

        def loss_towards(target: Tensor) -> Loss:
            def loss(logits: Tensor, rows: Tensor) -> Tensor:
                true, aim = (logits.gather(1, of[rows, None]).squeeze(1) for of in (labels, target))
                first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
                return (aim - true) / (first - (third + fourth) / 2 + 1e-12)

            return loss

        losses = [loss_towards(wrong[:, i]) for i in range(min(self.n_target_classes, wrong.shape[1]))]
        return _attack_l1(self, images, labels, losses)


def _attack_l1(attack: torchattacks.APGD | torchattacks.APGDT, images: Tensor, labels: Tensor, losses: list) -> Tensor:
    """Runs on each loss, of the images that still stand."""
    if attack.seed is not None:
        torch.random.manual_seed(attack.seed)
    adversarial = images.clone()
    with torch.no_grad():
        standing = (attack.get_logits(images).argmax(1) == labels).nonzero().squeeze(1)
    for loss in losses:
        for _ in range(attack.n_restarts):
            # Drawn for all images: the start of one must not depend on the fate of others.
            start = images + torch.randn_like(images)
            if not len(standing):
                return adversarial
            found, fooled = _run(attack, loss, images[standing], labels[standing], start[standing], standing)
            adversarial[standing[fooled]] = found[fooled]
            standing = standing[~fooled]
    return adversarial


def _run(attack, loss: Loss, images: Tensor, labels: Tensor, start: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One run through all radii: points, and which of them fool the model in the ball of radius eps, (b,)."""

    def look(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss (b,), its gradient, and whether the model is fooled (b,)."""
        grad = torch.zeros_like(points)
        for _ in range(attack.eot_iter):
            points = points.detach().requires_grad_()
            logits = attack.get_logits(points)
            values = loss(logits, rows)
            grad += torch.autograd.grad(values.sum(), points)[0]
        return values.detach(), grad, logits.detach().argmax(1) != labels

    early = int(_EARLY * attack.steps)
    points = start
    for radius, steps in ((3 * attack.eps, early), (2 * attack.eps, early), (attack.eps, attack.steps - 2 * early)):
        points = ball.project(points, images, radius, 'L1')
        points, found, fooled = _climb(look, points, images, radius, steps)
    return found, fooled


def _climb(look: Callable, points: Tensor, images: Tensor, eps: float, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The point of the largest loss, a point that fools the model if there is one, and whether there is (b,)."""
    moved = _moved(points, images)
    share = moved / images[0].numel() / _SPARSER
    length = torch.full_like(share, eps)
    loss, grad, fooled = look(points)
    best, best_grad, largest, found = points.clone(), grad.clone(), loss, points.clone()
    period = max(int(_PERIOD * steps), 1)
    for step in range(1, steps + 1):
        points = ball.project(_sparse_step(points, grad, length, share), images, eps, 'L1')
        loss, grad, wrong = look(points)
        found[wrong], fooled = points[wrong], fooled | wrong
        # Written so that a loss that is no number shows in the images.
        better = ~(loss <= largest)
        best[better], best_grad[better], largest = points[better], grad[better], torch.where(better, loss, largest)
        if step % period == 0:
            before, moved = moved, _moved(best, images)
            sparser = moved < _SETTLED * before
            share = moved / images[0].numel() / _SPARSER
            length = torch.where(sparser, eps, length / _STEP_DECAY).clamp(min=_SHORTEST_STEP * eps)
            points = torch.where(sparser[:, None, None, None], best, points)
            grad = torch.where(sparser[:, None, None, None], best_grad, grad)
    return best, found, fooled


def _moved(points: Tensor, images: Tensor) -> Tensor:
    """How many coordinates of each image differ, (b,)."""
    return (points != images).flatten(1).sum(1).to(points.dtype)


def _sparse_step(points: Tensor, grad: Tensor, length: Tensor, share: Tensor) -> Tensor:
    """Move the share of the coordinates with the largest gradients, at least one, equally far; ``length`` in all."""
    size = grad.abs().flatten(1)
    count = (share * size.shape[1]).long().clamp(1, size.shape[1])
    least = size.sort(dim=1, descending=True).values.gather(1, count[:, None] - 1)
    signs = grad.flatten(1).sign() * (size >= least)
    moves = signs * (length / signs.abs().sum(1).clamp(min=1))[:, None]
    return points + moves.view_as(points)
