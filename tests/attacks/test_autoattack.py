import inspect

import pyautoattack
import pytest
import torch
import torchattacks
from original_autoattack import run_original

from mmadvmoe.attacks import AutoAttack, Victim, build_attack
from mmadvmoe.attacks.autoattack import PARTS, VERSIONS

QUICK = dict(type='AutoAttack', steps=3, n_queries=5)


# Of the authors' class: the attribute that holds each part, and what it sets there.
COMMON = ('eps', 'norm', 'n_restarts')
ATTRIBUTES = {
    'apgd-ce': 'apgd',
    'apgd-dlr': 'apgd',
    'apgd-t': 'apgd_targeted',
    'fab': 'fab',
    'fab-t': 'fab',
    'square': 'square',
}
SETTINGS = dict(
    apgd=(*COMMON, 'n_iter', 'eot_iter', 'thr_decr', 'use_largereps', 'topk'),
    apgd_targeted=(*COMMON, 'n_iter', 'eot_iter', 'thr_decr', 'use_largereps', 'topk', 'n_target_classes'),
    fab=(*COMMON, 'n_iter', 'n_target_classes', 'alpha_max', 'eta', 'beta'),
    square=(*COMMON, 'n_queries', 'p_init', 'rescale_schedule', 'loss', 'targeted'),
)


@pytest.mark.parametrize('version', ['standard', 'plus', 'rand'])
@pytest.mark.parametrize(('norm', 'eps'), [('Linf', 0.1), ('L2', 0.5), ('L1', 12.0)])
def test_settings_are_those_of_the_authors(make_tiny, norm, eps, version):
    victim, _, _ = make_tiny(num_classes=100)
    ours = build_attack(dict(type='AutoAttack', norm=norm, eps=eps, version=version), victim).attack
    theirs = pyautoattack.AutoAttack(victim, norm=norm, eps=eps, seed=0, version=version)
    assert ours.parts == theirs.attacks_to_run
    for name in ours.parts:
        if name == 'fab-t':
            # As they do before they run it.
            theirs.fab.n_restarts = 1
        own, published = ours.authors_part(name), getattr(theirs, ATTRIBUTES[name])
        assert type(own) is type(published)
        for key in SETTINGS[ATTRIBUTES[name]]:
            assert getattr(own, key) == getattr(published, key), (name, key)


@pytest.mark.parametrize(('norm', 'eps'), [('Linf', 0.02), ('L2', 0.2), ('L1', 1.0)])
def test_images_are_those_of_the_authors_bit_for_bit(make_tiny, norm, eps):
    victim, images, labels = make_tiny(num_classes=10, batch=8)
    short = dict(steps=6, n_queries=20)
    with victim.frozen():
        expected = run_original(victim, images, labels, norm, eps, seed=3, **short)
    found = build_attack(dict(type='AutoAttack', norm=norm, eps=eps, **short), victim)(images, labels, seed=3)
    assert torch.equal(found, expected)
    # Some stand to the end: each part had images to attack.
    assert 0 < (victim(found).argmax(1) != labels).sum() < 8


@pytest.mark.parametrize(('norm', 'eps'), [('Linf', 0.015), ('L2', 0.15)])
@pytest.mark.parametrize('part', ['apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square'])
def test_parts_find_what_those_of_torchattacks_find(make_tiny, part, norm, eps):
    victim, images, labels = make_tiny(batch=16)
    theirs = {
        'apgd-ce': dict(type='APGD', steps=20),
        'apgd-dlr': dict(type='APGD', steps=20, loss='dlr'),
        'apgd-t': dict(type='APGDT', steps=20),
        'fab': dict(type='FAB', steps=20),
        'fab-t': dict(type='FAB', steps=20, multi_targeted=True),
        'square': dict(type='Square', n_queries=100, resc_schedule=False),
    }[part]
    ours = dict(type='AutoAttack', attacks_to_run=[part], steps=20, n_queries=100)
    robust = []
    for cfg in (ours, theirs):
        adversarial = build_attack(dict(cfg, norm=norm, eps=eps), victim)(images, labels, seed=0)
        robust.append(int((victim(adversarial).argmax(1) == labels).sum()))
    assert 0 < min(robust) and max(robust) < 16
    assert abs(robust[0] - robust[1]) <= 1


@pytest.mark.parametrize('norm', ['L2', 'L1'])
@pytest.mark.parametrize(('height', 'width'), [(4, 4), (12, 12), (14, 14), (32, 24)])
def test_sizes_on_which_square_cannot_begin_are_named(norm, height, width):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * height * width, 5))
    victim, images, labels = Victim(model, num_classes=5), torch.rand(2, 3, height, width), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=f"norm='{norm}' on images of {height}x{width} pixels"):
        build_attack(dict(QUICK, norm=norm, eps=0.1), victim)(images, labels)
    parts = ['apgd-ce', 'apgd-t', 'fab-t']
    assert build_attack(dict(QUICK, norm=norm, eps=0.1, attacks_to_run=parts), victim)(images, labels).isfinite().all()
    assert build_attack(dict(QUICK, eps=0.1), victim)(images, labels).isfinite().all()


def test_tells_how_many_images_are_robust_after_each_part_if_asked(make_tiny, monkeypatch, capsys):
    victim, images, labels = make_tiny()
    told = []
    monkeypatch.setattr('mmadvmoe.attacks.autoattack.print_log', lambda line, logger: told.append(line))
    build_attack(dict(QUICK, eps=1e-6), victim)(images, labels)
    assert told == []
    build_attack(dict(QUICK, eps=1e-6, verbose=True), victim)(images, labels)
    assert told == [f'AutoAttack: 4 of 4 images are robust after {name}' for name in VERSIONS['standard']]
    # The authors' classes print nothing.
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    ('num_classes', 'version', 'expected'),
    [
        (4, 'standard', ['apgd-ce', 'apgd-t', 'fab-t', 'square']),
        (3, 'standard', ['apgd-ce', 'apgd-dlr', 'fab-t', 'square']),
        (2, 'standard', ['apgd-ce', 'fab-t', 'square']),
        (4, 'plus', ['apgd-ce', 'apgd-dlr', 'fab', 'square', 'apgd-t', 'fab-t']),
        (3, 'plus', ['apgd-ce', 'apgd-dlr', 'fab', 'square', 'fab-t']),
        (2, 'plus', ['apgd-ce', 'fab', 'square', 'fab-t']),
        (3, 'rand', ['apgd-ce', 'apgd-dlr']),
        (2, 'rand', ['apgd-ce']),
    ],
)
def test_losses_that_do_not_exist_for_few_classes_are_left_out(make_tiny, num_classes, version, expected):
    victim, images, labels = make_tiny(num_classes)
    cfg = dict(QUICK, version=version, steps=1)
    attack = build_attack(cfg, victim)
    assert attack.attack.parts == expected
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
    sizes, build = [], attack.attack.authors_part

    def watched(*arguments):
        part = build(*arguments)
        perturb = part.perturb
        part.perturb = lambda x, y: (sizes.append(len(x)), perturb(x, y))[1]
        return part

    attack.attack.authors_part = watched
    adversarial = attack(images, labels)
    assert sizes == [1, 1, 1, 1]
    assert torch.equal(adversarial[1:], images[1:])
    assert victim(adversarial)[0].argmax() == 0


def test_seed_of_the_call_reaches_every_part(make_tiny):
    victim, images, labels = make_tiny()
    attack = build_attack(dict(QUICK, eps=1.0), victim)
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
@pytest.mark.parametrize(('norm', 'order', 'eps'), [('Linf', float('inf'), 0.3), ('L1', 1, 20.0)])
def test_each_part_alone_for_any_class_count(make_tiny, part, num_classes, norm, order, eps):
    """What does not exist for few classes is refused; all else finds what is close by."""
    victim, images, labels = make_tiny(num_classes, batch=16)
    cfg = dict(type='AutoAttack', attacks_to_run=[part], norm=norm, eps=eps, steps=10, n_queries=100)
    # With 3 classes APGD on DLR stands in for its targeted form.
    if num_classes == 2 and part in ('apgd-dlr', 'apgd-t'):
        with pytest.raises(ValueError, match=rf"attacks_to_run=\['{part}'\]: one does not exist for n_classes=2"):
            build_attack(cfg, victim)
        return
    adversarial = build_attack(cfg, victim)(images, labels, seed=0)
    assert (adversarial - images).flatten(1).norm(p=order, dim=1).max() <= eps * (1 + 1e-5)
    fooled = (victim(adversarial).argmax(1) != labels).float().mean()
    assert fooled > 0.5
