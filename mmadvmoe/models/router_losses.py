"""Losses of the routers: routes that stay under attack, all experts in use, logits within bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce
from mmpretrain.registry import MODELS
from torch import Tensor

from mmadvmoe.attacks import kl_divergence
from mmadvmoe.moe import ClassGroups, Routing
from mmadvmoe.moe.class_groups import MODULO, Groups
from mmadvmoe.utils import choose

from .losses import Objective, RobustBatch, check_hard_labels, check_weight


class RouterObjective(Objective):
    """Base of the losses of router logits alone."""

    needs_classes = False
    needs_routers = True


@MODELS.register_module()
class ClassGroupLoss(RouterObjective):
    r"""Teach the routers to tell groups of classes apart, one group for each expert, under attack.

    .. math:: L = w \cdot CE(r(x'), g(y))

    with r the router's logits, averaged over the routers and, where it reads them, over tokens, g(y) the group of the
    class, and x' the attacked image; the attack that belongs to it, as ``data_preprocessor.router_attack``, is
    :class:`mmadvmoe.attacks.ClassGroupAttack`. A route then holds as far as the groups can be told apart robustly, so
    choose groups that an attack seldom confuses. Of class probabilities (batch augmentations) each group gets the mass
    of its classes.

    Args:
        groups (str or Sequence[Sequence[int or str]]): See :class:`mmadvmoe.moe.ClassGroups`. Defaults to ``'modulo'``:
            class y belongs to expert y mod N, as in the AdvMoE reference code.
        classes (str or Sequence[str], optional): See :class:`mmadvmoe.moe.ClassGroups`. Defaults to None.
        weight (float): At least 0. Defaults to 1.
        images (str): ``'adversarial'`` or ``'clean'``: which ones are classified. Defaults to ``'adversarial'``.

    Raises:
        ValueError: The groups do not fit each other, the experts or the classes, or another argument is not allowed.

    Examples:
        >>> router_loss = dict(type='ClassGroupLoss', groups=[[0, 6], [1, 2, 3, 4, 5, 7, 8, 9]])
    """

    def __init__(
        self,
        groups: Groups = MODULO,
        classes: None | str | Sequence[str] = None,
        weight: float = 1.0,
        images: str = 'adversarial',
    ) -> None:
        super().__init__()
        self.groups = ClassGroups(groups, classes)
        self.weight = check_weight('ClassGroupLoss.weight', weight)
        self.images = choose(images, ('adversarial', 'clean'), 'ClassGroupLoss.images')

    def check_model(self, num_experts: int, num_classes: int | None) -> None:
        """See :meth:`mmadvmoe.moe.ClassGroups.check`."""
        self.groups.check(num_experts, num_classes)

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_class_group``."""
        routings = getattr(batch, self.images).routings
        return dict(loss_class_group=self.weight * self.groups.cross_entropy(routings, batch.target).mean())


@MODELS.register_module()
class RouterLabelLoss(RouterObjective):
    r"""The router objective of the AdvMoE reference code, which differs from the paper's.

    .. math:: L = \alpha \cdot CE(r(x), y \bmod N) + \beta \cdot KL(r(x) \,\|\, r(x'))

    with r(x) the router's logits, averaged over the routers and, where it reads them, over tokens. The first term asks
    for a fixed expert per class, so every expert is used (:class:`ClassGroupLoss` of clean images); the second keeps
    the route under attack (:class:`RouterKLLoss`, but averaged over the routers).

    Args:
        alpha (float): Weight of the cross entropy, at least 0. Defaults to 6.
        beta (float): Weight of the KL, at least 0. Defaults to 6.
    """

    needs_hard_labels = True

    def __init__(self, alpha: float = 6.0, beta: float = 6.0) -> None:
        super().__init__()
        self.label = ClassGroupLoss(weight=check_weight('RouterLabelLoss.alpha', alpha), images='clean')
        self.beta = check_weight('RouterLabelLoss.beta', beta)

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_route_label`` and ``loss_route_robust``; ValueError for soft labels."""
        check_hard_labels('RouterLabelLoss', batch.target)
        robust = _route_divergence(batch) / len(batch.clean.routings)
        return dict(loss_route_label=self.label(batch)['loss_class_group'], loss_route_robust=self.beta * robust)


@MODELS.register_module()
class RouterKLLoss(RouterObjective):
    r"""Keep the routers' decisions under attack: ``weight * KL(r(x) || r(x'))``, summed over the routers.

    Averaged over tokens where a router reads them. To be added to any other objective.

    Args:
        weight (float): At least 0. Defaults to 1.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = check_weight('RouterKLLoss.weight', weight)

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_route_robust``."""
        return dict(loss_route_robust=self.weight * _route_divergence(batch))


class AuxiliaryRouterLoss(RouterObjective):
    """Base of the losses of one router at a time, averaged over clean and adversarial images and over the routers.

    To leave them out of the experts' turn, add them to ``router_loss`` and not to ``robust_loss``. Logged as
    ``loss_<term>``; several routers also log the value of each, without its weight, as ``<term>_<index>``.

    Args:
        weight (float): At least 0. Defaults to 1.
    """

    term: str

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = check_weight(f'{type(self).__name__}.weight', weight)

    def measure(self, routing: Routing) -> Tensor:
        """The loss of one router for one version of the batch, a scalar."""
        raise NotImplementedError

    def forward(self, batch: RobustBatch) -> dict[str, Tensor]:
        """Give ``loss_<term>``, and the value of each router where there are several."""
        views = [routings for routings in (batch.clean.routings, batch.adversarial.routings) if routings]
        values = [sum(self.measure(routing) for routing in pair) / len(pair) for pair in zip(*views)]
        terms = {f'loss_{self.term}': self.weight * sum(values) / len(values)}
        if len(values) > 1:
            terms.update({f'{self.term}_{index}': value.detach() for index, value in enumerate(values)})
        return terms


@MODELS.register_module()
class RouterBalanceLoss(AuxiliaryRouterLoss):
    r"""Ask a router to use all of its experts.

    .. math:: L = w \cdot N \sum_n f_n P_n

    with f_n the share of the images (or tokens) routed to expert n and P_n the mean probability of expert n. Only P has
    a gradient: it takes probability away from the experts with the largest shares. L is w when either is uniform, and
    near w N when one expert takes all. Fedus et al., "Switch Transformers", arXiv:2101.03961, equation 4.
    """

    term = 'balance'

    def measure(self, routing: Routing) -> Tensor:
        """In [0, N]."""
        probability = _probabilities(routing).mean(dim=0)
        share = routing.load.to(probability.dtype)
        share = share / share.sum()
        # Linear in P, so with the global share its mean over processes is the loss of the global batch.
        all_reduce(share, 'mean')
        return routing.num_experts * (share * probability).sum()


@MODELS.register_module()
class RouterLocalEntropyLoss(AuxiliaryRouterLoss):
    r"""Ask for decided routes: :math:`L = w \cdot E_x H(r(x))`, the entropy of the softmax of one image, in nats.

    Balance alone is content with the same probability of all experts for every image; such routes differ by next to
    nothing, and any attack changes them. By itself this loss sends everything to one expert: use it beside
    :class:`RouterGlobalEntropyLoss` or :class:`RouterBalanceLoss`. Mustafa et al., "Multimodal Contrastive Learning
    with LIMoE", arXiv:2206.02770, equation 4.
    """

    term = 'local_entropy'

    def measure(self, routing: Routing) -> Tensor:
        """In [0, ln N]."""
        return _entropy(_probabilities(routing)).mean()


@MODELS.register_module()
class RouterGlobalEntropyLoss(AuxiliaryRouterLoss):
    r"""Ask for the use of all experts: :math:`L = -w \cdot H(E_x r(x))`, in nats.

    The entropy of the mean softmax, negated; the mean is over the batch of all processes. Beside
    :class:`RouterLocalEntropyLoss` of the same weight it is minus the mutual information of image and expert. Mustafa
    et al., "Multimodal Contrastive Learning with LIMoE", arXiv:2206.02770, equation 5.
    """

    term = 'global_entropy'

    def measure(self, routing: Routing) -> Tensor:
        """In [-ln N, 0]."""
        return -_entropy(_global_mean(_probabilities(routing).mean(dim=0)))


@MODELS.register_module()
class RouterImportanceLoss(AuxiliaryRouterLoss):
    r"""Ask for equal importance of the experts: :math:`L = w \cdot (std(I) / mean(I))^2`.

    I_n is the sum of the probabilities of expert n over the images (or tokens) of the batch, of all processes. 0 when
    it is the same for all experts. Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", arXiv:2106.05974,
    appendix A.
    """

    term = 'importance'

    def measure(self, routing: Routing) -> Tensor:
        """In [0, N - 1]."""
        return _squared_variation(_global_mean(_probabilities(routing).mean(dim=0)))


@MODELS.register_module()
class RouterLoadLoss(AuxiliaryRouterLoss):
    r"""Ask for an equal load of the experts: :math:`L = w \cdot (std(l) / mean(l))^2`.

    l_n is the sum over the tokens of the probability that expert n would be chosen if its noise were drawn again, so
    it has a gradient, as the number of choices has not; it needs a router with noise. 0 when all loads are equal.
    Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", arXiv:2106.05974, appendix A.
    """

    term = 'load'

    def measure(self, routing: Routing) -> Tensor:
        """In [0, N - 1].

        Raises:
            ValueError: The router draws no noise.
        """
        if not routing.noise_std:
            raise ValueError(
                "RouterLoadLoss needs a router with noise: set backbone.routing='token' and backbone.router="
                "dict(type='TokenRouter', noise=1.0), or use RouterImportanceLoss or RouterBalanceLoss"
            )
        shortfall = (routing.threshold.unsqueeze(-1) - routing.logits) / routing.noise_std
        chosen = 0.5 * torch.erfc(shortfall.float() / math.sqrt(2))
        return _squared_variation(_global_mean(chosen.flatten(0, -2).mean(dim=0)))


@MODELS.register_module()
class RouterZLoss(AuxiliaryRouterLoss):
    r"""Keep logits small: :math:`L = w \cdot mean(\log^2 \sum_n e^{r_n(x)})`.

    Large logits make rounding errors and sharp gradients. Zoph et al., "ST-MoE", arXiv:2202.08906, equation 5, whose
    weight is 0.001.
    """

    term = 'z'

    def measure(self, routing: Routing) -> Tensor:
        """At least 0."""
        return routing.logits.float().logsumexp(dim=-1).square().mean()


def _route_divergence(batch: RobustBatch) -> Tensor:
    """KL between the router logits of clean and adversarial images, summed over the routers."""
    pairs = zip(batch.clean.routings, batch.adversarial.routings)
    return sum(kl_divergence(clean.logits, adversarial.logits).mean() for clean, adversarial in pairs)


def _probabilities(routing: Routing) -> Tensor:
    """(images or tokens, N), in float32."""
    return routing.logits.float().flatten(0, -2).softmax(dim=-1)


def _entropy(probability: Tensor) -> Tensor:
    """(..., N) -> (...), in nats."""
    return torch.special.entr(probability.clamp(min=torch.finfo(probability.dtype).tiny)).sum(dim=-1)


def _global_mean(local: Tensor) -> Tensor:
    """The mean over all processes, with the gradient of the local value.

    Distributed training averages gradients over processes, which makes that the gradient of the global mean.
    """
    everywhere = local.detach().clone()
    all_reduce(everywhere, 'mean')
    return local + (everywhere - local.detach())


def _squared_variation(values: Tensor) -> Tensor:
    return values.var(correction=0) / values.mean().square()
