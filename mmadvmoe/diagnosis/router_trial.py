"""A small router trained by itself on groups of classes: whether routes can hold before a mixture is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS
from torch import Tensor

from mmadvmoe.attacks import BoundAttack, Victim, build_attack
from mmadvmoe.moe import ClassGroups
from mmadvmoe.runtime.console import quiet
from mmadvmoe.runtime.seeding import preserve_rng_state

from .class_groups import Partition
from .subject import Images, ThreatModel, percent
from .substitute import predict

#: Where more routes than this can be changed (%), a mixture was not seen to pay for its router.
MOST_FLIPS = 5.0
#: The recipe of a router's turn: PGD on the cross entropy of the groups, SGD with clipped steps.
_ATTACK_STEPS, _LEARNING_RATE, _MAX_NORM = 4, 0.1, 1.0


@dataclass(frozen=True)
class RouterTrial:
    """How well a router holds, in percent of the images.

    Attributes:
        sa: Sent to the expert of their class.
        ra: The same without and under an attack that aims at the wrong expert.
        flips: Whose route some attack changed.
        majority: In the largest group: what a router that always says the same has for ``ra``.
    """

    sa: float
    ra: float
    flips: float
    majority: float

    @property
    def pays(self) -> bool:
        """Whether a mixture may pay: few routes can be changed, by a router that is not nearly a constant."""
        return self.flips <= MOST_FLIPS and self.ra - self.majority > (100 - self.majority) / 2


def default_router(images: Images) -> dict:
    """An MLP on the pixels, pooled where images are large."""
    channels, *size = images.images.shape[1:]
    pool = next(pool for pool in range(max(1, round(min(size) / 28)), 0, -1) if not any(side % pool for side in size))
    size = size[0] if size[0] == size[1] else tuple(size)
    return dict(type='MLPRouter', image_size=size, in_channels=channels, hidden=16, pool=pool)


def try_router(
    partition: Partition,
    train: Images,
    test: Images,
    threat: ThreatModel,
    like: Victim,
    router: Mapping | None = None,
    iterations: int = 3000,
    batch_size: int = 128,
) -> RouterTrial:
    """Train a router by itself on the groups of a partition, then attack it.

    It learns as in the turns of a :class:`~mmadvmoe.models.ClassGroupLoss`: cross entropy of images attacked in four
    steps of eps/2, SGD with a cosine schedule. The random state of the caller is left as it is.

    Args:
        partition (Partition): One group for each expert.
        train, test (Images): Images to learn from, and others to attack; the seed of ``train`` decides the training.
        threat (ThreatModel): The balls, and the steps of the attacks on the trained router.
        like (Victim): The model whose normalisation the router gets.
        router (Mapping, optional): Config of the router, which gets ``num_experts``. Defaults to
            :func:`default_router`.
        iterations (int): Updates. Defaults to 3000.
        batch_size (int): Defaults to 128.
    """
    groups, num_groups = ClassGroups(partition.groups), len(partition.groups)
    with preserve_rng_state():
        torch.manual_seed(train.seed)
        network = MODELS.build(dict(router or default_router(train), num_experts=num_groups)).to(train.images.device)
        with quiet():
            network.init_weights()
        victim = Victim(network, getattr(like.classifier, 'data_preprocessor', None), num_classes=num_groups)
        alpha = min(threat.eps / 2, 1.0)
        attack = build_attack(ThreatModel(threat.norm, threat.eps, alpha, _ATTACK_STEPS).attack('PGD'), victim)
        _fit(victim, attack, train, groups.experts_of(train.labels, num_groups), iterations, batch_size)
    expert = groups.experts_of(test.labels, num_groups)
    attack = build_attack(threat.attack('PGD'), victim)
    clean = predict(victim, test.images)
    # To another expert than the clean one, and to another than that of the class.
    moved, wrong = (
        predict(victim, Images(test.images, labels, test.chunk_size, test.seed).attacked('router', attack))
        for labels in (clean, expert)
    )
    return RouterTrial(
        sa=percent(clean == expert),
        ra=percent((clean == expert) & (moved == expert) & (wrong == expert)),
        flips=percent((moved != clean) | (wrong != clean)),
        majority=100 * max(partition.load),
    )


def _fit(victim: Victim, attack: BoundAttack, train: Images, expert: Tensor, iterations: int, batch_size: int) -> None:
    router = victim.classifier
    optimizer = torch.optim.SGD(router.parameters(), _LEARNING_RATE, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    router.train()
    for _ in range(iterations):
        rows = torch.randint(len(train), (min(batch_size, len(train)),), device=expert.device)
        images, target = train.images[rows], expert[rows]
        loss = F.cross_entropy(victim(attack(images, target)), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), _MAX_NORM)
        optimizer.step()
        schedule.step()
    router.eval()


def config_fragment(
    partition: Partition, names: Sequence[str], threat: ThreatModel, router: Mapping, pays: bool = True
) -> str:
    """What to write into the config of a mixture, with these groups for its router."""
    lines = [] if pays else ['# Routes do not hold with these groups: this mixture will hardly pay.']
    lines += ['groups = [']
    lines += [f'    {list(group)},  # {", ".join(names[index] for index in group)}' for group in partition.groups]
    attack = (
        f"type='ClassGroupAttack', groups=groups, norm={threat.norm!r}, eps={threat.eps:g}, alpha={threat.eps / 2:g}"
    )
    settings = ', '.join(f'{key}={value!r}' for key, value in router.items())
    lines += [
        ']',
        'model = dict(',
        "    route='held',",
        "    data_preprocessor=dict(attack=dict(route='held'), router_attack=dict(",
        f'        _delete_=True, {attack}, steps={_ATTACK_STEPS})),',
        f'    backbone=dict(num_experts={len(partition.groups)}, router=dict(',
        f'        _delete_=True, {settings})),',
        "    router_loss=dict(_delete_=True, type='ClassGroupLoss', groups=groups),",
        ')',
    ]
    return '\n'.join(lines)


def as_numbers(partition: Partition, names: Sequence[str], trial: RouterTrial | None) -> dict:
    """What a file of results holds of a partition."""
    groups = [[names[index] for index in group] for group in partition.groups]
    tried = None if trial is None else dict(asdict(trial), pays=trial.pays)
    return dict(groups=partition.groups, names=groups, kept=partition.kept, load=partition.load, router=tried)
