"""Classes in groups, one group for each expert: what a router can be taught to tell apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmpretrain.registry import DATASETS
from torch import Tensor

from mmadvmoe.utils import choose

from .routing import BaseRouting

#: ``groups`` as configs write them: lists of class indices or names, or :data:`MODULO`.
Groups = str | Sequence[Sequence[int | str]]
#: Class y belongs to expert y mod N, as in the AdvMoE reference code.
MODULO = 'modulo'


class ClassGroups:
    """Which expert the images of each class belong to.

    Args:
        groups (str or Sequence[Sequence[int or str]]): The classes of each expert, by index or by name, each class
            once; or ``'modulo'``: class y belongs to expert y mod N.
        classes (str or Sequence[str], optional): The names of all classes in order, or the data set type that knows
            them, such as ``'FashionMNIST'``. Needed where ``groups`` has names.

    Raises:
        ValueError: A class is unknown, in no group or in two, or a group is empty.
    """

    def __init__(self, groups: Groups = MODULO, classes: None | str | Sequence[str] = None) -> None:
        self.classes: list[str] = []  # all classes in order, where groups have their names
        self.num_groups: int | None = None
        self._expert_of: Tensor | None = None
        if isinstance(groups, str):
            choose(groups, (MODULO,), 'groups')
            return
        names, experts = _names(classes), {}
        if any(isinstance(each, str) for group in groups for each in group):
            self.classes = names
        for expert, group in enumerate(groups):
            if not len(group):
                raise ValueError(f'groups={groups}: group {expert} is empty, so its expert would never be used')
            for each in group:
                index = names.index(choose(each, names, 'groups: class')) if isinstance(each, str) else each
                if index in experts:
                    raise ValueError(f'groups={groups}: class {each!r} is in two groups')
                experts[index] = expert
        missing = sorted(set(range(len(names) or len(experts))) - set(experts))
        if missing:
            raise ValueError(
                f'groups={groups}: classes {[names[i] if names else i for i in missing]} are in no group; each of the '
                f'classes 0 to {max(*experts, *missing)} must be in one'
            )
        self.num_groups = len(groups)
        self._expert_of = torch.tensor([experts[index] for index in sorted(experts)])

    def check(self, num_experts: int, num_classes: int | None) -> None:
        """Raise ValueError unless there is a group for each expert and every class of the model is in one."""
        if self._expert_of is None:
            return
        if self.num_groups != num_experts:
            raise ValueError(f'{self.num_groups} groups do not fit backbone.num_experts={num_experts}: one for each')
        if num_classes is not None and len(self._expert_of) != num_classes:
            raise ValueError(f'groups holds {len(self._expert_of)} classes, but head.num_classes={num_classes}')

    def experts_of(self, labels: Tensor, num_experts: int) -> Tensor:
        """The expert of each image, (B,) int64 for class indices (B,); for class probabilities (B, K) the mass of each
        expert's classes, (B, N).
        """
        if self._expert_of is not None:
            self._expert_of = self._expert_of.to(labels.device)
        if labels.dim() == 1:
            return labels % num_experts if self._expert_of is None else self._expert_of[labels]
        expert_of = self._expert_of
        if expert_of is None:
            expert_of = torch.arange(labels.shape[1], device=labels.device) % num_experts
        return labels.new_zeros(len(labels), num_experts).index_add(1, expert_of, labels)

    def cross_entropy(self, routings: Sequence[BaseRouting], labels: Tensor) -> Tensor:
        """Cross entropy of the routers' logits with the group of the class, (B,): the mean over routers and tokens.

        Labels are (B,) int64, or class probabilities (B, K).
        """
        losses = []
        for routing in routings:
            logits = routing.token_logits.float()
            target = self.experts_of(labels, routing.num_experts)
            target = target[:, None].expand(-1, logits.shape[1], *target.shape[1:])
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction='none')
            losses.append(loss.view(logits.shape[:2]).mean(1))
        return torch.stack(losses).mean(0)


def _names(classes: None | str | Sequence[str]) -> list[str]:
    if not isinstance(classes, str):
        return list(classes or ())
    kind = DATASETS.get(classes) or choose(classes, sorted(DATASETS.module_dict), 'classes')
    return list(kind.METAINFO['classes'])
