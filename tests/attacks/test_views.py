"""Views of a mixture: one expert alone, other logits, and RoutePGD at one expert."""

import pytest
import torch

from mmadvmoe.attacks import ForcedRoutePGD, Pathway, Rescaled, Victim, build_attack
from mmadvmoe.moe import router_modules


@pytest.fixture(params=['image', 'layer'])
def victim(make_moe, request):
    victim = Victim(make_moe(request.param)).eval()
    victim.classifier.head.fc.weight.data.normal_()
    return victim


def routes(victim, images):
    with torch.no_grad():
        return torch.cat([routing.decisions for routing in victim.forward_routed(images)[1]], dim=1)


def test_a_pathway_is_a_network_without_routers(victim):
    images = torch.rand(5, 3, 8, 8)
    pathways = [Pathway(victim, expert) for expert in range(2)]
    outputs = [pathway(images) for pathway in pathways]
    for expert, (pathway, logits) in enumerate(zip(pathways, outputs)):
        assert torch.equal(logits, victim.forward_routed(images, torch.full((5,), expert))[0])
        assert (pathway.num_routers, pathway.num_experts, pathway.num_classes) == (0, 1, victim.num_classes)
        assert torch.equal(pathway.forward_routed(images)[0], logits) and pathway.forward_routed(images)[1] == ()
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize('kind', ['PGD', 'RoutePGD', 'Square'])
def test_any_attack_attacks_a_pathway(victim, kind):
    """The routers are not run at all, and the pathway is what the adversarial images fool."""
    pathway = Pathway(victim, 1)
    images = torch.rand(8, 3, 8, 8)
    # As it is drawn, one class wins by far.
    victim.classifier.head.fc.bias.data -= pathway(images).detach().mean(dim=0)
    labels = pathway(images).argmax(1).detach()

    def asked(*_):
        raise AssertionError('a router was asked')

    handles = [router.register_forward_hook(asked) for router in router_modules(victim.classifier)]
    adversarial = build_attack(dict(type=kind, eps=0.5), pathway)(images, labels, seed=0)
    for handle in handles:
        handle.remove()
    assert (pathway(adversarial).argmax(1) != labels).any()


def test_wrong_pathways(victim, make_tiny):
    with pytest.raises(ValueError, match='expert=2 does not exist; allowed: 0 to 1'):
        Pathway(victim, 2)
    with pytest.raises(ValueError, match='this model has no routers'):
        Pathway(make_tiny()[0], 0)
    with pytest.raises(ValueError, match='given to a pathway'):
        Pathway(victim, 0).forward_routed(torch.rand(1, 3, 8, 8), route=torch.zeros(1, dtype=torch.long))


def test_other_logits_give_the_same_predictions_and_routes(victim):
    images = torch.rand(6, 3, 8, 8)
    rescaled = Rescaled(victim, 4.0)
    logits, routings = rescaled.forward_routed(images)
    assert torch.allclose(4 * logits, victim(images)) and torch.equal(logits, rescaled(images))
    assert torch.equal(torch.cat([routing.decisions for routing in routings], dim=1), routes(victim, images))
    with pytest.raises(ValueError, match='scale=0'):
        Rescaled(victim, 0)


@pytest.mark.parametrize('expert', [0, 1])
def test_a_forced_route_is_taken(make_moe, expert):
    """With labels that no attack can spoil, all that is left to do is to change the route."""
    victim = Victim(make_moe('image')).eval()
    victim.classifier.head.fc.weight.data.zero_()
    victim.classifier.head.fc.bias.data.copy_(torch.arange(4.0))
    router = victim.classifier.backbone.router
    images = torch.rand(8, 3, 8, 8)
    with torch.no_grad():
        # In the middle, where both experts can be reached.
        router.fc.bias -= victim.forward_routed(images)[1][0].logits.mean(0)
    attack = build_attack(dict(type=ForcedRoutePGD, expert=expert, eps=0.3, alpha=0.1, steps=10), victim)
    adversarial = attack(images, torch.full((8,), 3), seed=0)
    assert (adversarial - images).abs().max() <= 0.3 + 1e-6
    before, after = ((routes(victim, each) == expert).sum() for each in (images, adversarial))
    assert before < after == 8
