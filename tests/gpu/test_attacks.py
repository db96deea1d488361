"""Attacks on a GPU: inside the ball, reproducible, and as strong as on the CPU."""

import pytest
import torch
from small_mixtures import random_mixture

from mmadvmoe.attacks import HeldVictim, Pathway, Victim, build_attack
from mmadvmoe.evaluation.chunks import evaluate_chunk
from mmadvmoe.evaluation.data import Chunk
from mmadvmoe.moe import PLACEMENTS

NORMS = dict(Linf=(0.1, 0.03), L2=(1.0, 0.3), L1=(10.0, 3.0))


def victim_on(device, routing='image'):
    victim = random_mixture(routing)
    victim.model.to(device)
    return victim


def batch(device, size=12):
    return torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)


def labels_of(victim, images):
    with torch.no_grad():
        return victim(images).argmax(1)


def distance(images, adversarial, norm):
    offset = (adversarial - images).flatten(1)
    return offset.norm(p=dict(Linf=torch.inf, L2=2, L1=1)[norm], dim=1).max().item()


OWN = [
    *(('PGD', norm) for norm in NORMS),
    *(('TRADESAttack', norm) for norm in NORMS),
    *(('RoutePGD', norm) for norm in NORMS),
    ('RouterAttack', 'Linf'),
]


@pytest.mark.parametrize(('kind', 'norm'), OWN)
def test_own_attacks_stay_in_the_ball_and_repeat(device, kind, norm):
    victim = victim_on(device)
    images = batch(device)
    eps, alpha = NORMS[norm]
    attack = build_attack(dict(type=kind, norm=norm, eps=eps, alpha=alpha, steps=4), victim)
    labels = labels_of(victim, images)
    adversarial = attack(images, labels, seed=3)
    assert adversarial.device.type == device.type and not adversarial.requires_grad
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert 0 < distance(images, adversarial, norm) <= eps * (1 + 1e-5)
    torch.testing.assert_close(attack(images, labels, seed=3), adversarial)


@pytest.mark.parametrize('kind', ['FGSM', 'BIM', 'MIFGSM', 'APGD', 'Square', 'FAB'])
def test_attacks_of_torchattacks(device, kind):
    victim = victim_on(device)
    images = batch(device)
    short = dict(Square=dict(n_queries=5), FGSM={}, FAB=dict(steps=2, n_restarts=1)).get(kind, dict(steps=3))
    attack = build_attack(dict(type=kind, eps=0.1, **short), victim)
    adversarial = attack(images, labels_of(victim, images), seed=3)
    assert adversarial.device.type == device.type
    assert distance(images, adversarial, 'Linf') <= 0.1 + 1e-5 or kind == 'FAB'


def test_autoattack_by_its_authors(device):
    victim = victim_on(device)
    images = batch(device, 6)
    attack = build_attack(dict(type='AutoAttack', eps=0.1, steps=2, n_queries=5), victim)
    adversarial = attack(images, labels_of(victim, images), seed=0)
    assert adversarial.device.type == device.type and distance(images, adversarial, 'Linf') <= 0.1 + 1e-5


@pytest.mark.parametrize('routing', PLACEMENTS)
def test_pgd_with_the_route_held_attacks_the_pathway_of_the_clean_image(device, routing):
    victim = victim_on(device, routing)
    images = batch(device, 6)
    labels = labels_of(victim, images)
    settings = dict(type='PGD', eps=0.1, alpha=0.05, steps=2, random_start=False)
    held = build_attack(dict(settings, route='held'), victim)(images, labels)
    with torch.no_grad():
        routes = torch.cat([routing.decisions for routing in victim.decide_routes(images)], dim=1)
    for i in range(6):
        alone = build_attack(settings, HeldVictim(victim, routes[i]))(images[i : i + 1], labels[i : i + 1])
        # A sign may differ where a gradient is next to nothing.
        assert ((held[i] - alone[0]).abs() < 1e-6).float().mean() > 0.95


@pytest.mark.parametrize('routing', ['image', 'layer'])
def test_steps_on_a_pathway_never_make_the_host_wait(device, routing, no_waiting):
    pathway = Pathway(victim_on(device, routing), 1)
    images = batch(device)
    attack = build_attack(dict(type='PGD', eps=0.1, alpha=0.05, steps=3), pathway)
    attack(images, labels_of(pathway, images))
    labels = labels_of(pathway, images)
    with pathway.frozen(), torch.enable_grad(), no_waiting:
        # Without the checks around it, which may wait.
        attack.attack.forward(images, labels)


def test_a_mixture_under_attack_leaves_its_flags_as_they_were(device):
    victim = victim_on(device).train()
    flags = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in victim.model.modules()]
    images = batch(device)
    build_attack(dict(type='PGD', steps=1), victim)(images, labels_of(victim, images))
    after = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in victim.model.modules()]
    assert flags == after


def test_a_seed_leaves_the_random_state_of_the_device(device):
    victim = victim_on(device)
    images = batch(device)
    labels = labels_of(victim, images)
    attack = build_attack(dict(type='PGD', steps=1), victim)
    torch.manual_seed(5)
    expected = torch.rand(3, device=device)
    torch.manual_seed(5)
    attack(images, labels, seed=1)
    assert torch.equal(torch.rand(3, device=device), expected)


@pytest.mark.parametrize('routing', PLACEMENTS)
def test_an_evaluation_is_that_of_the_cpu_within_one_image_of_360(device, routing):
    cpu = random_mixture(routing)
    images = batch('cpu', 360)
    labels = labels_of(cpu, images)
    # Some are wrong already.
    labels[::10] = (labels[::10] + 1) % 4
    settings = dict(eps=0.02, alpha=0.01, steps=2, random_start=False)
    robust = []
    for place in ('cpu', device):
        victim = Victim(cpu.classifier.to(place)).eval()
        attacks = dict(
            pgd=build_attack(dict(type='PGD', **settings), victim),
            routepgd=build_attack(dict(type='RoutePGD', **settings), victim),
        )
        chunk = Chunk(0, range(360), images.to(place), labels.to(place))
        outcomes = evaluate_chunk(victim, attacks, chunk)
        robust.append(outcomes.robust.sum().item())
    assert 0 < robust[0] < 324
    assert abs(robust[0] - robust[1]) <= 1
