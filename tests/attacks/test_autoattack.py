import inspect

import pytest
import torch
import torchattacks

from mmadvmoe.attacks import AutoAttack, build_attack
from mmadvmoe.attacks.autoattack import PARTS

QUICK = dict(type='AutoAttack', steps=3, n_queries=5)


def ensemble(attack):
    return [(type(part).__name__, getattr(part, 'loss', None)) for part in attack.attacks]


def test_published_settings_are_the_defaults(make_tiny):
    victim, _, _ = make_tiny(num_classes=100)
    attack = build_attack(dict(type='AutoAttack', eps=0.1), victim)._attack
    apgd, targeted, fab, square = attack.attacks
    assert ensemble(attack)[0] == ('APGD', 'ce')
    assert (apgd.steps, targeted.steps, fab.steps, square.n_queries) == (100, 100, 100, 5000)
    assert targeted.n_target_classes == fab.n_target_classes == 9
    assert fab.multi_targeted
    assert not square.rescale_schedule
    assert {part.eps for part in attack.attacks} == {0.1}


def test_published_settings_in_l1(make_tiny):
    victim, _, _ = make_tiny(num_classes=100)
    apgd, targeted = build_attack(dict(type='AutoAttack', norm='L1', eps=12), victim)._attack.attacks
    assert (apgd.loss, apgd.n_restarts, apgd.steps) == ('ce', 5, 100)
    assert (targeted.n_target_classes, targeted.n_restarts, targeted.steps) == (5, 1, 100)


@pytest.mark.parametrize(
    ('num_classes', 'version', 'expected'),
    [
        (4, 'standard', ['APGD ce', 'APGDT', 'FAB', 'Square margin']),
        (3, 'standard', ['APGD ce', 'APGD dlr', 'FAB', 'Square margin']),
        (2, 'standard', ['APGD ce', 'FAB', 'Square margin']),
        (4, 'plus', ['APGD ce', 'APGD dlr', 'FAB', 'Square margin', 'APGDT', 'FAB']),
        (3, 'plus', ['APGD ce', 'APGD dlr', 'FAB', 'Square margin', 'FAB']),
        (2, 'plus', ['APGD ce', 'FAB', 'Square margin', 'FAB']),
        (3, 'rand', ['APGD ce', 'APGD dlr']),
        (2, 'rand', ['APGD ce']),
    ],
)
def test_losses_that_do_not_exist_for_few_classes_are_left_out(make_tiny, num_classes, version, expected):
    victim, images, labels = make_tiny(num_classes)
    cfg = dict(QUICK, version=version, steps=1)
    attack = build_attack(cfg, victim)
    assert [' '.join(filter(None, part)) for part in ensemble(attack._attack)] == expected
    assert attack(images, labels).shape == images.shape


@pytest.mark.parametrize('num_classes', [2, 3, 10, 100])
@pytest.mark.parametrize('batch', [1, 7])
@pytest.mark.parametrize(('norm', 'order', 'eps'), [('Linf', float('inf'), 0.05), ('L2', 2, 0.5), ('L1', 1, 3.0)])
def test_inside_the_ball_for_any_class_count_and_batch(make_tiny, num_classes, batch, norm, order, eps):
    victim, images, labels = make_tiny(num_classes, batch)
    adversarial = build_attack(dict(QUICK, eps=eps, norm=norm), victim)(images, labels, seed=0)
    distance = (adversarial - images).flatten(1).norm(p=order, dim=1)
    assert distance.max() <= eps + 1e-5
    assert 0 <= adversarial.min() and adversarial.max() <= 1


def test_finds_what_any_attack_of_the_ensemble_finds(make_tiny):
    victim, images, labels = make_tiny(batch=16)
    eps = 0.02
    attack = build_attack(dict(QUICK, eps=eps, steps=10), victim)
    fooled = victim(attack(images, labels, seed=0)).argmax(1) != labels
    assert 0 < fooled.sum() < 16
    for name in ('APGD', 'FAB'):
        part = build_attack(dict(type=name, eps=eps, steps=10), victim)
        found = victim(part(images, labels, seed=0)).argmax(1) != labels
        assert (fooled | ~found).all()


def test_one_image_that_keeps_standing_among_many(make_tiny):
    """Every attack after the first sees a batch of one."""
    victim, images, labels = make_tiny(batch=6)
    with torch.no_grad():
        # Class 0 wins by far on image 0 alone.
        feature = victim.classifier.backbone(images)
        direction = feature[0] - feature[1:].mean(0)
        weight = torch.zeros(5, 64)
        weight[0] = 50 * direction
        victim.classifier.head.weight.copy_(weight)
        bias = -50 * (feature[0] @ direction + feature[1:].mean(0) @ direction) / 2
        victim.classifier.head.bias.copy_(torch.tensor([bias.item(), 0.01, 0.0, 0.0, 0.0]))
    labels = victim(images).argmax(1)
    assert labels.tolist() == [0, 1, 1, 1, 1, 1]
    labels[1:] = 2
    attack = build_attack(dict(QUICK, eps=1e-3), victim)
    sizes = []
    for part in attack._attack.attacks:
        forward = part.forward
        part.forward = lambda x, y, forward=forward: (sizes.append(len(x)), forward(x, y))[1]
    adversarial = attack(images, labels)
    assert sizes == [1, 1, 1, 1]
    assert torch.equal(adversarial[1:], images[1:])
    assert victim(adversarial)[0].argmax() == 0


def test_seed_of_the_call_reaches_every_part(make_tiny):
    victim, images, labels = make_tiny()
    attack = build_attack(dict(QUICK, eps=1.0), victim)
    assert {id(part) for part in attack._seeded} == {id(part) for part in attack._attack.attacks}
    first, second = (attack(images, labels, seed=seed) for seed in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first, attack(images, labels, seed=1))


def test_takes_all_that_torchattacks_takes():
    theirs = inspect.signature(torchattacks.AutoAttack).parameters
    assert set(theirs) <= set(inspect.signature(AutoAttack).parameters)


def test_the_layout_of_the_images_in_memory_does_not_matter(make_tiny):
    victim, images, labels = make_tiny()
    attack = build_attack(dict(type='FAB', eps=0.1, steps=2), victim)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(attack(channels_last, labels, seed=0), attack(images, labels, seed=0))


@pytest.mark.parametrize('num_classes', [2, 3, 4, 11])
@pytest.mark.parametrize('part', PARTS)
def test_each_part_alone_for_any_class_count(make_tiny, part, num_classes):
    """What does not exist for few classes leaves the images as they are; all else finds what is close by."""
    victim, images, labels = make_tiny(num_classes, batch=16)
    cfg = dict(type='AutoAttack', attacks_to_run=[part], eps=0.3, steps=10, n_queries=100)
    adversarial = build_attack(cfg, victim)(images, labels, seed=0)
    assert (adversarial - images).abs().max() <= 0.3 + 1e-6
    fooled = (victim(adversarial).argmax(1) != labels).float().mean()
    # With 3 classes APGD on DLR stands in for its targeted form.
    exists = num_classes > 2 or part not in ('apgd-dlr', 'apgd-t')
    assert fooled > 0.5 if exists else torch.equal(adversarial, images)
