import pytest
import torch
import torch.nn.functional as F
import torchattacks

from mmadvmoe.attacks import HeldVictim, Victim, build_attack

EPS, ALPHA, STEPS = 0.03, 0.008, 6


@pytest.mark.parametrize('batch', [7, 8])
def test_default_is_the_pgd_of_torchattacks(make_tiny, batch):
    victim, images, labels = make_tiny(batch=batch)
    cfg = dict(type='PGD', eps=EPS, alpha=ALPHA, steps=STEPS)
    theirs = build_attack(dict(cfg, type=torchattacks.PGD), victim)
    assert torch.equal(build_attack(cfg, victim)(images, labels, seed=3), theirs(images, labels, seed=3))


def test_restarts_keep_the_worst_of_each_image(make_tiny):
    victim, images, labels = make_tiny(batch=24)
    cfg = dict(type='PGD', eps=0.02, alpha=0.004, steps=2)

    def outcome(restarts):
        logits = victim(build_attack(dict(cfg, restarts=restarts), victim)(images, labels, seed=0)).detach()
        return logits.argmax(1) != labels, F.cross_entropy(logits, labels, reduction='none')

    (one, loss_one), (five, loss_five) = outcome(1), outcome(5)
    assert one.sum() < 24 and (five | ~one).all()
    assert (loss_five >= loss_one)[~five].all() and (loss_five > loss_one).any()


@pytest.mark.parametrize(('routing', 'num_experts'), [('image', 3), ('layer', 2)])
def test_held_route_is_the_clean_one_in_our_pgd_and_in_any_attack(make_moe, routing, num_experts):
    victim = Victim(make_moe(routing, num_experts).eval())
    images = torch.rand(8, 3, 8, 8)
    labels = victim(images).argmax(1)
    route = torch.cat([routing.decisions for routing in victim.forward_routed(images)[1]], dim=1)
    points = images
    for _ in range(STEPS):
        points = points.detach().requires_grad_()
        F.cross_entropy(victim.forward_routed(points, route)[0], labels, reduction='sum').backward()
        points = points.detach() + ALPHA * points.grad.sign()
        points = (images + (points - images).clamp(-EPS, EPS)).clamp(0, 1)
    cfg = dict(eps=EPS, alpha=ALPHA, steps=STEPS, route='held')
    ours = build_attack(dict(cfg, type='PGD', random_start=False), victim)(images, labels)
    # BIM is PGD without a random start; the class of torchattacks is run once for each route.
    theirs = build_attack(dict(cfg, type='BIM'), victim)(images, labels)
    assert len(route.unique(dim=0)) > 1
    for adversarial in (ours, theirs):
        # Sums in another order may turn the sign of a gradient that is all but 0.
        assert ((adversarial - points).abs() < 1e-5).float().mean() > 0.99


def test_on_a_dense_model_there_is_no_route_to_hold(make_tiny):
    victim, images, labels = make_tiny()
    for name in ('PGD', 'MIFGSM'):
        gate, held = (build_attack(dict(type=name, route=route), victim) for route in ('gate', 'held'))
        assert torch.equal(gate(images, labels, seed=0), held(images, labels, seed=0))


@pytest.mark.parametrize('name', ['AutoAttack', 'APGDT', 'FAB', 'Square', 'TRADESAttack', 'DeepFool', 'CW', 'SPSA'])
def test_attacks_of_any_kind_run_with_the_route_held(make_moe, name):
    victim = Victim(make_moe(num_experts=3).eval())
    images = torch.rand(5, 3, 8, 8)
    labels = victim(images).argmax(1)
    quick = {
        'AutoAttack': dict(steps=2, n_queries=3),
        'Square': dict(n_queries=3),
        'SPSA': dict(nb_iter=1, nb_sample=4, max_batch_size=4),
    }
    attack = build_attack(dict(type=name, route='held', **quick.get(name, dict(steps=2))), victim)
    adversarial = attack(images, labels, seed=1)
    assert adversarial.shape == images.shape and 0 <= adversarial.min() and adversarial.max() <= 1
    assert torch.equal(adversarial, attack(images, labels, seed=1))


def test_a_held_route_is_taken_by_all_images(make_moe):
    victim = Victim(make_moe().eval())
    images = torch.rand(2, 3, 8, 8)
    for expert in (0, 1):
        held = HeldVictim(victim, torch.tensor([expert]))
        expected, _ = victim.forward_routed(images, torch.full((2,), expert))
        assert torch.equal(held(images), expected)
