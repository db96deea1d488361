from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.diagnosis.class_groups import (
    Partition,
    RouterTrial,
    attacked_confusion,
    config_fragment,
    default_router,
    find_class_groups,
    modulo_partition,
    try_router,
)
from mmadvmoe.diagnosis.subject import Images, ThreatModel

THREAT = ThreatModel('Linf', 0.1, 0.025, 8)


def in_blocks(sizes, inside, seed=0):
    """A confusion of classes in blocks, shuffled: of 100 images of a class, ``inside`` go to others of the block, and
    the rest of what is confused to all others. Gives the blocks as well."""
    random = np.random.RandomState(seed)
    classes = random.permutation(sum(sizes))
    blocks = np.split(classes, np.cumsum(sizes)[:-1])
    confusion = random.uniform(0.0, 0.4, (len(classes), len(classes)))
    for block in blocks:
        confusion[np.ix_(block, block)] += inside / len(block)
    np.fill_diagonal(confusion, 100 - confusion.sum(1) + confusion.diagonal())
    return confusion, {frozenset(block.tolist()) for block in blocks}


@pytest.mark.parametrize('sizes', [(3, 3), (2, 2, 2), (1, 1, 2, 2)])
def test_all_partitions_of_few_classes_are_tried(sizes):
    confusion = np.random.RandomState(len(sizes)).dirichlet([0.3] * 6, 6) * 100
    found = find_class_groups(confusion, len(sizes), max_load=0.7, count=5)
    # By hand: every way to give 6 classes to the groups.
    best = {}
    for group_of in product(range(len(sizes)), repeat=6):
        partition = Partition.of(group_of, confusion)
        if len(partition.groups) == len(sizes) and max(partition.load) <= 0.7 + 1e-9:
            best[partition.groups] = partition.kept
    assert [each.kept for each in found] == pytest.approx(sorted(best.values(), reverse=True)[:5])
    assert all(best[each.groups] == pytest.approx(each.kept) for each in found)
    assert all(sum(each.load) == pytest.approx(1) for each in found)


@pytest.mark.parametrize(('sizes', 'seed'), [((25, 25, 25, 25), 0), ((10, 30, 20, 40), 1), ((6, 7) * 4, 2)])
def test_blocks_of_many_classes_are_found(sizes, seed):
    confusion, blocks = in_blocks(sizes, inside=40, seed=seed)
    best, *_ = find_class_groups(confusion, len(sizes), max_load=0.45)
    assert {frozenset(group) for group in best.groups} == blocks
    assert best.kept > modulo_partition(confusion, len(sizes)).kept


@pytest.mark.parametrize('seed', range(4))
def test_partitions_found_twice_leave_room_for_others(seed):
    confusion = np.random.RandomState(seed).rand(20, 20)
    found = {partition.groups for partition in find_class_groups(confusion, 4, count=3)}
    several = {partition.groups for partition in find_class_groups(confusion, 4, count=30)}
    assert len(found) == min(3, len(several)) > 1


def test_the_load_is_kept_to():
    confusion, _ = in_blocks((60, 10, 10, 10), inside=40)
    for partition in find_class_groups(confusion, 4, max_load=0.3):
        assert len(partition.groups) == 4 and max(partition.load) <= 0.3 + 1e-9
    # One class against all others would be kept most.
    small = np.diag([80.0] * 5) + 4
    (best,) = find_class_groups(small, 2, count=1)
    assert sorted(map(len, best.groups)) == [1, 4] and max(best.load) == pytest.approx(0.8)
    (best,) = find_class_groups(small, 2, max_load=0.6, count=1)
    assert sorted(map(len, best.groups)) == [2, 3]


def test_what_cannot_be_found_is_said():
    with pytest.raises(ValueError, match='num_groups=6 must lie between 2 and the number of classes, 5'):
        find_class_groups(np.eye(5), 6)
    with pytest.raises(ValueError, match=r'max_load=0.2 must lie between 1 / num_groups = 0.5 and 1'):
        find_class_groups(np.eye(5), 2, max_load=0.2)
    with pytest.raises(ValueError, match=r'max_load=0.5: no partition .* the largest class has 0.9'):
        find_class_groups(np.diag([90.0, 5, 5]), 2, max_load=0.5)


def bright_or_dark(count, contrast, classes=4):
    """Images (B, 1, 8, 8): the first half of the classes is dark on the left, the others on the right; a single pixel
    tells the classes of a half apart, so weakly that any attack confuses them."""
    labels = torch.arange(count) % classes
    images = torch.full((count, 1, 8, 8), 0.5) + 0.05 * torch.rand(count, 1, 8, 8)
    sign = torch.where(labels < classes // 2, -1.0, 1.0).view(-1, 1, 1)
    images[:, 0, :, :4] += sign * contrast
    images[:, 0, :, 4:] -= sign * contrast
    images[:, 0, 0, 0] += 0.02 * (labels % 2)
    return Images(images.clamp(0, 1), labels)


def halves(victim_classes=4):
    """A linear classifier of :func:`bright_or_dark`."""
    linear = nn.Linear(64, victim_classes)
    with torch.no_grad():
        linear.weight.zero_()
        left = torch.zeros(8, 8)
        left[:, :4], left[:, 4:] = 1.0, -1.0
        for index in range(victim_classes):
            linear.weight[index] = left.flatten() * (1 if index >= victim_classes // 2 else -1)
            linear.weight[index, 0] += 10 * (index % 2)
            linear.bias[index] = -5.3 * (index % 2)
    return Victim(nn.Sequential(nn.Flatten(), linear), num_classes=victim_classes)


def test_confusion_stays_in_groups_that_can_be_told_apart_robustly():
    data = bright_or_dark(40, contrast=0.3)
    confusion = attacked_confusion(halves(), data, THREAT)
    assert confusion.sum(1).tolist() == [10] * 4 and confusion.trace() < 30
    best, *_ = find_class_groups(confusion, 2)
    assert best.groups == ((0, 1), (2, 3)) and best.kept == 1
    assert modulo_partition(confusion, 2).kept < 0.8


def test_a_router_on_trial_holds_where_groups_differ_by_more_than_the_ball():
    data, like = bright_or_dark(32, contrast=0.3), halves()
    same, mixed = (Partition.of(group_of, np.eye(4)) for group_of in ([0, 0, 1, 1], [0, 1, 0, 1]))
    before = torch.get_rng_state()
    trials = [try_router(each, data, data, THREAT, like, iterations=50) for each in (same, same, mixed)]
    assert trials[0] == RouterTrial(sa=100, ra=100, flips=0, majority=50) and trials[0].pays
    assert trials[1] == trials[0] and not trials[2].pays
    assert torch.equal(before, torch.get_rng_state())
    assert default_router(data) == dict(type='MLPRouter', image_size=8, in_channels=1, hidden=16, pool=1)


def test_a_router_learns_in_steps_of_half_the_radius_in_wide_balls_too(monkeypatch):
    built = []

    def noted(cfg, victim):
        built.append(cfg)
        return build_attack(cfg, victim)

    monkeypatch.setattr('mmadvmoe.diagnosis.class_groups.build_attack', noted)
    data, halved = bright_or_dark(8, contrast=0.3), Partition.of([0, 0, 1, 1], np.eye(4))
    try_router(halved, data, data, ThreatModel('L1', 12.0, 1.0, 4), halves(), iterations=1)
    assert [(cfg['eps'], cfg['alpha'], cfg['steps']) for cfg in built] == [(12, 6, 4), (12, 1, 4)]


def test_a_router_that_always_says_the_same_does_not_pay():
    assert RouterTrial(sa=98, ra=95, flips=4, majority=60).pays
    assert not RouterTrial(sa=98, ra=93, flips=6, majority=60).pays
    assert not RouterTrial(sa=61, ra=61, flips=0, majority=60).pays


def test_the_fragment_is_a_config_that_the_parts_take():
    from mmadvmoe.attacks import ClassGroupAttack
    from mmadvmoe.models import ClassGroupLoss
    from mmadvmoe.moe import MLPRouter

    partition = Partition.of([0, 1, 1, 0], np.eye(4))
    text = config_fragment(partition, 'abcd', THREAT, default_router(bright_or_dark(2, 0.1)), pays=False)
    assert text.startswith('# Routes do not hold') and '[0, 3],  # a, d' in text
    found = {}
    exec(text, found)
    model = found['model']
    assert found['groups'] == [[0, 3], [1, 2]] and model['route'] == 'held'
    loss, router, attack = (
        model['router_loss'],
        model['backbone']['router'],
        model['data_preprocessor']['router_attack'],
    )
    for part, kind in ((loss, ClassGroupLoss), (router, MLPRouter), (attack, ClassGroupAttack)):
        assert part.pop('type') == kind.__name__ and part.pop('_delete_')
    assert ClassGroupLoss(**loss).groups.num_groups == 2
    assert MLPRouter(num_experts=2, **router)(torch.rand(3, 1, 8, 8)).shape == (3, 2)
    assert attack['eps'] == THREAT.eps and attack['alpha'] == THREAT.eps / 2
