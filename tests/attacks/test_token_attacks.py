import pytest
import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS

from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.attacks.route_pgd import _margins
from mmadvmoe.moe import router_modules

EPS, ALPHA, STEPS = 0.06, 0.02, 4


@pytest.fixture
def make_victim():
    """``make_victim(...)``: a classifier of 8 x 8 images whose two feed-forward networks have 3 experts each."""

    def make(**router):
        arch = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
        model = MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(
                    type='MoEBackbone',
                    num_experts=3,
                    include=['ffn'],
                    routing='token',
                    router=dict(type='TokenRouter', **router),
                    backbone=dict(type='VisionTransformer', arch=arch, img_size=8, patch_size=4),
                ),
                head=dict(type='LinearClsHead', num_classes=4, in_channels=16),
            )
        )
        for module in router_modules(model):
            torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(model.head.fc.weight)
        model.eval()
        return Victim(model)

    return make


def by_hand(forward, images, labels):
    """PGD on the cross entropy of ``forward``; gives the last point."""
    points = images
    for _ in range(STEPS):
        points = points.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(forward(points), labels), points)
        points = (points + ALPHA * grad.sign()).detach()
        points = (images + (points - images).clamp(-EPS, EPS)).clamp(0, 1)
    return points


@pytest.mark.parametrize(('top_k', 'softmax'), [(1, 'after'), (1, 'before'), (2, 'after')])
def test_route_pgd_is_at_least_as_strong_as_each_run_that_holds_a_route(make_victim, top_k, softmax):
    victim = make_victim(top_k=top_k, softmax=softmax)
    images = torch.rand(24, 3, 8, 8)
    labels = victim(images).argmax(1)
    attack = build_attack(dict(type='RoutePGD', eps=EPS, alpha=ALPHA, steps=STEPS, random_start=False), victim)
    adversarial = attack(images, labels)
    assert (adversarial - images).abs().max() <= EPS + 1e-6 and 0 <= adversarial.min() and adversarial.max() <= 1
    robust = victim(adversarial).argmax(1) == labels
    clean = torch.cat([routing.decisions for routing in victim.forward_routed(images)[1]], dim=1)
    assert robust.any() and not robust.all()
    for kwargs in (dict(route=clean), dict(gated=False)):
        points = by_hand(lambda x, kwargs=kwargs: victim.forward_routed(x, **kwargs)[0], images, labels)
        survives = victim(points).argmax(1) == labels
        assert (survives | ~robust).all()


@pytest.mark.parametrize('top_k', [1, 2])
def test_the_push_brings_tokens_to_the_forced_expert(make_victim, top_k):
    victim = make_victim(top_k=top_k)
    points = images = torch.rand(6, 3, 8, 8)
    route = torch.tensor([0, 1, 2] * 2)

    def share(x):
        routings = victim.forward_routed(x)[1]
        return sum((r.expert == route[:, None, None]).any(-1).double().mean() for r in routings) / 2

    for _ in range(10):
        points = points.detach().requires_grad_()
        (grad,) = torch.autograd.grad(_margins(victim.forward_routed(points, route)[1], route), points)
        points = (points + 0.02 * grad.sign()).clamp(0, 1)
    assert share(points) > share(images) + 0.1


def test_work_of_route_pgd(make_victim):
    """N + 2 runs; a step costs a second pass for images that a route was given and whose tokens do not all follow."""
    victim = make_victim()
    images = torch.rand(4, 3, 8, 8)
    labels = victim(images).argmax(1)
    seen = []
    handle = victim.classifier.head.register_forward_pre_hook(lambda module, args: seen.append(len(args[0][-1])))
    build_attack(dict(type='RoutePGD', eps=1e-6, alpha=1e-7, steps=2), victim)(images, labels)
    handle.remove()
    # Clean pass; held and own route: 2 steps and a check; 3 forced ones: 2 steps of two passes and a check.
    assert seen == [4] * (1 + 2 * 3 + 3 * 5)


def test_noise_and_training_capacity_stay_out_of_attacks(make_victim):
    quiet, noisy = make_victim(), make_victim(noise=3.0, capacity_factor=0.25)
    noisy.classifier.load_state_dict(quiet.classifier.state_dict())
    noisy.classifier.train()
    images = torch.rand(4, 3, 8, 8)
    for cfg in (dict(type='TRADESAttack', eps=0.1, alpha=0.05), dict(type='PGD', eps=0.1, alpha=0.05, steps=2)):
        labels = torch.zeros(4, dtype=torch.long)
        first, second = (build_attack(cfg, victim)(images, labels, seed=1) for victim in (quiet, noisy))
        assert torch.equal(first, second)
    assert all(module.training for module in noisy.classifier.modules())


def test_the_training_attack_moves_the_routers(make_victim):
    victim = make_victim()
    images = torch.rand(16, 3, 8, 8)
    logits = [routing.logits for routing in victim.forward_routed(images)[1]]

    def moved(weight):
        cfg = dict(type='TRADESAttack', eps=0.05, alpha=0.02, steps=4, router_weight=weight)
        attacked = victim.forward_routed(build_attack(cfg, victim)(images, seed=0))[1]
        pairs = zip(logits, attacked)
        return sum(F.kl_div(r.logits.log_softmax(-1), c.softmax(-1), reduction='sum').item() for c, r in pairs)

    assert moved(100.0) > 1.1 * moved(0.0) > 0


def test_an_attack_of_torchattacks_holds_the_choice_of_each_token(make_victim):
    victim = make_victim()
    images = torch.rand(6, 3, 8, 8)
    labels = victim(images).argmax(1)
    route = torch.cat([routing.decisions for routing in victim.forward_routed(images)[1]], dim=1).detach()
    assert len(route.unique(dim=0)) == len(images)
    settings = dict(eps=EPS, alpha=ALPHA, steps=STEPS)
    held = build_attack(dict(type='BIM', route='held', **settings), victim)(images, labels)
    expected = by_hand(lambda points: victim.forward_routed(points, route)[0], images, labels)
    torch.testing.assert_close(held, expected)
    gated = build_attack(dict(type='BIM', **settings), victim)(images, labels)
    assert not torch.allclose(gated, held)
