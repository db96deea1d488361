import pytest
import torch

from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.attacks.views import clean_route


def changed(victim, images, adversarial):
    return (clean_route(victim, images) != clean_route(victim, adversarial)).float().mean(1)


@pytest.mark.parametrize(('routing', 'num_experts'), [('image', 2), ('image', 3), ('layer', 2)])
@pytest.mark.parametrize(('norm', 'eps'), [('Linf', 0.1), ('L2', 1.0), ('L1', 12.0)])
def test_changes_more_routes_than_noise_and_than_an_attack_on_the_class(make_moe, routing, num_experts, norm, eps):
    victim = Victim(make_moe(routing, num_experts).eval())
    images = torch.rand(12, 3, 8, 8)
    labels = victim(images).argmax(1)
    common = dict(eps=eps, alpha=eps / 4, steps=8, norm=norm)
    adversarial = build_attack(dict(type='RouterAttack', **common), victim)(images, seed=0)
    distance = (
        (adversarial.double() - images.double()).flatten(1).norm(p=dict(Linf=float('inf'), L2=2, L1=1)[norm], dim=1)
    )
    assert distance.max() <= eps + 1e-6 and 0 <= adversarial.min() and adversarial.max() <= 1
    ours = changed(victim, images, adversarial)
    on_class = changed(victim, images, build_attack(dict(type='PGD', **common), victim)(images, labels, seed=0))
    noisy = changed(victim, images, (images + eps * torch.randn_like(images).sign()).clamp(0, 1))
    assert ours.mean() > on_class.mean()
    assert norm != 'Linf' or ours.mean() > noisy.mean()


def test_huge_and_tiny_logits_are_attacked_alike(make_moe):
    victim = Victim(make_moe().eval())
    images = torch.rand(12, 3, 8, 8)
    attack = build_attack(dict(type='RouterAttack', eps=0.05, alpha=0.01, steps=8), victim)
    shares = []
    head = victim.classifier.backbone.router.fc
    for scale in (1.0, 1e-12, 1e20):
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(scale)
        shares.append(changed(victim, images, attack(images, seed=0)).mean())
    assert shares[0] > 0 and shares[0] == shares[1] == shares[2]


def test_restarts_and_steps_only_add(make_moe):
    victim = Victim(make_moe('layer').eval())
    images = torch.rand(12, 3, 8, 8)
    common = dict(type='RouterAttack', eps=0.02, alpha=0.005)
    one, more = (build_attack(dict(common, steps=2, restarts=n), victim)(images, seed=0) for n in (1, 4))
    assert (changed(victim, images, more) >= changed(victim, images, one)).all()
    assert torch.equal(build_attack(dict(common, eps=0.0), victim)(images), images)
