"""Groups of classes whose routes can hold: which classes an attack confuses, and how to part them between experts,
and a small router trained by itself on such groups, before any mixture is.

Dimension letters: K classes, N groups, P partitions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS
from scipy.special import stirling2
from torch import Tensor

from mmadvmoe.attacks import BoundAttack, Victim, build_attack
from mmadvmoe.moe import ClassGroups
from mmadvmoe.runtime.console import quiet
from mmadvmoe.runtime.seeding import preserve_rng_state

from .subject import Images, ThreatModel, percent
from .substitute import predict

#: With at most this many partitions, all are looked at; else clusterings are improved class by class.
_MOST_PARTITIONS = 50_000
#: Partitions scored at a time.
_BATCH = 4096
#: Clusterings to begin with: linkages of agglomerative clustering, and seeds of spectral clustering.
_LINKAGES, _SEEDS = ('average', 'complete'), range(5)


@dataclass(frozen=True)
class Partition:
    """Classes in groups, one for each expert.

    Attributes:
        groups: The classes of each group, by index; the groups in the order of their first class.
        kept: Share of the attacked predictions that stay in the group of the true class, in [0, 1].
        load: Share of the images of each group.
    """

    groups: tuple[tuple[int, ...], ...]
    kept: float
    load: tuple[float, ...]

    @classmethod
    def of(cls, group_of: Sequence[int], confusion: np.ndarray) -> Partition:
        """The partition in which class k is in group ``group_of[k]``; empty groups are left out."""
        groups: dict[int, list[int]] = {}
        for index, group in enumerate(group_of):
            groups.setdefault(int(group), []).append(index)
        total = confusion.sum()
        kept = sum(confusion[np.ix_(group, group)].sum() for group in groups.values()) / total
        load = tuple(float(confusion[group].sum() / total) for group in groups.values())
        return cls(tuple(map(tuple, groups.values())), float(kept), load)


def attacked_confusion(victim: Victim, data: Images, threat: ThreatModel) -> np.ndarray:
    """Count what images of each class are taken for under attack: (K, K), the true class by row.

    The attack is RoutePGD, which is PGD on a dense network.

    Raises:
        RuntimeError: The attack fails.
    """
    adversarial = data.attacked('PGD', build_attack(threat.attack('RoutePGD'), victim))
    predicted = data.classified(victim, adversarial, 'PGD').prediction
    return count_pairs(data.labels.cpu(), predicted, (victim.num_classes, victim.num_classes))


def count_pairs(rows: Tensor, columns: Tensor, size: tuple[int, int]) -> np.ndarray:
    """How many images are in each row and column, (B,) int64, of a table of the given size."""
    return torch.bincount(rows * size[1] + columns, minlength=size[0] * size[1]).view(size).numpy()


def find_class_groups(
    confusion: np.ndarray, num_groups: int, max_load: float | None = None, count: int = 3
) -> list[Partition]:
    """Find the partitions of the classes that an attack leaves most seldom, the best one first.

    Of few classes all partitions are tried. Of many, clusterings of the confusion (agglomerative and spectral) are
    improved by moving one class at a time.

    Args:
        confusion (np.ndarray): From :func:`attacked_confusion`, (K, K).
        num_groups (int): N, 2 to K.
        max_load (float, optional): Largest share of the images in one group, as a group of nearly all classes would
            be easy to stay in, and of no use. Defaults to 2 / N, and 0.8 for two groups.
        count (int): How many. Defaults to 3; there may be fewer.

    Raises:
        ValueError: ``num_groups`` or ``max_load`` is out of range, or no partition keeps to it.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    classes = len(confusion)
    if confusion.shape != (classes, classes) or not confusion.sum() > 0:
        raise ValueError(f'confusion must be (K, K) counts, got shape {confusion.shape}')
    max_load = check_num_groups(num_groups, classes, max_load)
    share = confusion.sum(1) / confusion.sum()
    if stirling2(classes, num_groups, exact=True) <= _MOST_PARTITIONS:
        candidates = _all_partitions(classes, num_groups)
    else:
        starts = _clusterings(confusion, num_groups)
        candidates = (_improved(start, confusion, num_groups, max_load) for start in starts)
    best: dict[tuple, Partition] = {}
    while batch := list(islice(candidates, _BATCH)):
        group_of = np.stack(batch)
        same = group_of[:, :, None] == group_of[:, None]
        kept = (same * confusion).sum((1, 2))
        load = (np.arange(num_groups)[:, None, None] == group_of) @ share
        kept[load.max(0) > max_load + 1e-9] = -1
        of_batch: dict[tuple, Partition] = {}  # clusterings may find one partition several times
        for row in np.argsort(-kept, kind='stable'):
            if kept[row] < 0 or len(of_batch) == count:
                break
            found = Partition.of(group_of[row], confusion)
            of_batch[found.groups] = found
        best |= of_batch
    if not best:
        raise ValueError(
            f'max_load={max_load:.3g}: no partition into {num_groups} groups keeps to it; the largest class has '
            f'{share.max():.3g} of the images. Raise max_load, or ask for another number of groups'
        )
    return sorted(best.values(), key=lambda partition: -partition.kept)[:count]


def check_num_groups(num_groups: int, classes: int, max_load: float | None) -> float:
    """The ``max_load`` of :func:`find_class_groups`, or its default; raise ValueError where one is out of range."""
    if not 2 <= num_groups <= classes:
        raise ValueError(f'num_groups={num_groups} must lie between 2 and the number of classes, {classes}')
    if max_load is None:
        max_load = min(2 / num_groups, 0.8)
    if not 1 / num_groups <= max_load <= 1:
        raise ValueError(f'max_load={max_load} must lie between 1 / num_groups = {1 / num_groups:.3g} and 1')
    return max_load


def modulo_partition(confusion: np.ndarray, num_groups: int) -> Partition:
    """Class y in group y mod N, as in the AdvMoE reference code, to compare with."""
    return Partition.of(np.arange(len(confusion)) % num_groups, confusion)


def _all_partitions(classes: int, groups: int) -> Iterator[np.ndarray]:
    """The group of each class; a new group is always the next one, so no partition comes twice."""

    def extend(prefix: list[int], used: int) -> Iterator[np.ndarray]:
        left = classes - len(prefix)
        if not left:
            yield np.array(prefix)
            return
        for group in range(min(used + 1, groups)):
            now = max(used, group + 1)
            if groups - now < left:
                yield from extend([*prefix, group], now)

    return extend([], 0)


def _clusterings(confusion: np.ndarray, num_groups: int) -> Iterator[np.ndarray]:
    # A slow import, and of use here alone.
    from sklearn.cluster import AgglomerativeClustering, SpectralClustering

    rates = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    # Pairs that were never confused are a little alike all the same: the graph must be connected.
    alike = rates + rates.T + 1e-4
    np.fill_diagonal(alike, alike.max())
    for linkage in _LINKAGES:
        clustering = AgglomerativeClustering(num_groups, metric='precomputed', linkage=linkage)
        yield clustering.fit_predict(alike.max() - alike)
    for seed in _SEEDS:
        yield SpectralClustering(num_groups, affinity='precomputed', random_state=seed).fit_predict(alike)


def _improved(start: np.ndarray, confusion: np.ndarray, num_groups: int, max_load: float) -> np.ndarray:
    """Move single classes, first to keep to the load, then as long as more predictions are kept."""
    group_of = start.copy()
    share = confusion.sum(1) / confusion.sum()
    both = confusion + confusion.T
    np.fill_diagonal(both, 0)
    classes = np.arange(len(confusion))
    # Each move of the first kind takes from what is too much, each of the second gains: more than enough.
    for _ in range(20 * len(confusion)):
        member = np.eye(num_groups)[group_of]
        load, size = share @ member, member.sum(0)
        # What each class would keep in each group, compared with where it is.
        gain = both @ member
        gain -= gain[classes, group_of][:, None]
        allowed = (load + share[:, None] <= max_load + 1e-9) & (size[group_of] > 1)[:, None] & (member == 0)
        forced = load[group_of] > max_load + 1e-9
        empty = size == 0
        if empty.any():
            allowed[:, ~empty] = False
        elif forced.any():
            allowed[~forced] = False
        else:
            allowed &= gain > 1e-9
        if not allowed.any():
            break
        moved, to = np.unravel_index(np.where(allowed, gain, -np.inf).argmax(), gain.shape)
        group_of[moved] = to
    return group_of


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
        learnt = ThreatModel(threat.norm, threat.eps, threat.eps / 2, _ATTACK_STEPS)
        attack = build_attack(learnt.attack('PGD'), victim)
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
