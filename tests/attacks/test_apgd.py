"""APGD in L1: inside the ball, as strong as can be where that is known, and torchattacks' own in the other norms."""

import pytest
import torch
import torchattacks
from torch import nn

from mmadvmoe.attacks import Victim, build_attack


class Linear(nn.Module):
    """A linear classifier of images (B, 3, 5, 5)."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(75, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1))


def linear_victim(num_classes):
    victim = Victim(Linear(num_classes), num_classes=num_classes)
    images = torch.rand(12, 3, 5, 5)
    return victim, images, victim(images).argmax(1).detach()


def distance_to_any_class(victim, images, labels):
    """The least L1 distance inside [0, 1] at which a linear classifier errs, (B,).

    To gain most per unit one moves the coordinate with the largest weight as far as [0, 1] goes, then the next.
    """
    weight = victim.classifier.head.weight.detach()
    logits = victim(images).detach()
    nearest = torch.full((len(images),), torch.inf)
    for i, (image, label) in enumerate(zip(images.flatten(1), labels.tolist())):
        for other in set(range(len(weight))) - {label}:
            slope = weight[other] - weight[label]
            gap = logits[i, label] - logits[i, other]
            room = torch.where(slope > 0, 1 - image, image)
            order = slope.abs().argsort(descending=True)
            gains = (slope.abs() * room)[order].cumsum(0)
            last = int((gains < gap).sum())
            if last < len(order):
                before = gains[last - 1] if last else 0.0
                cost = room[order][:last].sum() + (gap - before) / slope.abs()[order[last]]
                nearest[i] = torch.minimum(nearest[i], cost)
    return nearest


@pytest.mark.parametrize(
    ('cfg', 'num_classes'),
    [
        (dict(type='APGD', loss='ce'), 2),
        (dict(type='APGDT'), 5),
        (dict(type='AutoAttack', n_queries=50), 2),
        (dict(type='AutoAttack', n_queries=50), 5),
    ],
    ids=lambda value: value.get('loss', value['type']) if isinstance(value, dict) else str(value),
)
def test_finds_the_nearest_error_of_a_linear_classifier(cfg, num_classes):
    victim, images, labels = linear_victim(num_classes)
    # The ensemble is slow.
    nearest = distance_to_any_class(victim, images, labels)[: 3 if cfg['type'] == 'AutoAttack' else 6]
    assert nearest.isfinite().all()
    for i, distance in enumerate(nearest.tolist()):
        one, label = images[i : i + 1], labels[i : i + 1]
        for factor, fooled in ((1.1, True), (0.95, False)):
            attack = build_attack(dict(cfg, norm='L1', eps=factor * distance, steps=100), victim)
            adversarial = attack(one, label, seed=0)
            assert (victim(adversarial).argmax(1) != label).item() == fooled
            assert (adversarial - one).abs().sum() <= factor * distance + 1e-5
            assert 0 <= adversarial.min() and adversarial.max() <= 1


def test_is_not_weaker_than_pgd(make_tiny):
    victim, images, labels = make_tiny(batch=64)
    pgd = dict(type='PGD', norm='L1', eps=2.5, alpha=0.6, steps=50)
    standing = []
    for cfg in (pgd, dict(type='APGD', norm='L1', eps=2.5, steps=50)):
        adversarial = build_attack(cfg, victim)(images, labels, seed=0)
        standing.append(int((victim(adversarial).argmax(1) == labels).sum()))
    assert 0 < standing[1] <= standing[0] < 64


def test_settings_reach_the_runs(make_tiny):
    victim, images, labels = make_tiny()
    passes = []
    victim.classifier.register_forward_hook(lambda *_: passes.append(1))
    # Out of reach, so that all runs are made: 20 iterations and a look at the start on each radius, before them one.
    for settings, expected in ((dict(), 1 + 23), (dict(eot_iter=2), 1 + 46), (dict(n_restarts=2), 1 + 46)):
        passes.clear()
        build_attack(dict(type='APGD', norm='L1', eps=1e-6, steps=20, **settings), victim)(images, labels)
        assert len(passes) == expected
    passes.clear()
    build_attack(dict(type='APGDT', norm='L1', eps=1e-6, steps=20), victim)(images, labels)
    # Each target asks for the order of the wrong classes.
    assert len(passes) == 1 + 4 * 24


@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize('name', ['APGD', 'APGDT'])
def test_other_norms_are_those_of_torchattacks(make_tiny, name, norm):
    victim, images, labels = make_tiny()
    eps = 0.05 if norm == 'Linf' else 0.5
    classes = dict(n_classes=5) if name == 'APGDT' else {}
    expected = getattr(torchattacks, name)(victim, norm=norm, eps=eps, steps=5, seed=3, **classes)(images, labels)
    ours = build_attack(dict(type=name, norm=norm, eps=eps, steps=5, seed=3), victim)(images, labels)
    assert torch.equal(ours, expected)
