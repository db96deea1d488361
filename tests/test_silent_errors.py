"""What would give plausible numbers that mean nothing is refused, wherever a model classifies."""

import pytest
import torch
from small_mixtures import random_mixture

from mmadvmoe.apis import evaluate_robustness, inference
from mmadvmoe.attacks import build_attack
from mmadvmoe.diagnosis.dissection import dissect
from mmadvmoe.diagnosis.subject import Images, ThreatModel
from mmadvmoe.moe import NonFiniteRouterError, router_modules

SIZES = dict(eps=0.1, alpha=0.05, steps=1)
PATHS = {
    'model': lambda victim, images, labels: victim.model(images),
    'routes': lambda victim, images, labels: victim.decide_routes(images),
    'inference': lambda victim, images, labels: inference(victim, images),
    'evaluation': lambda victim, images, labels: evaluate_robustness(victim, (images, labels), ['pgd10'], eps=0.1),
    'PGD': lambda victim, images, labels: build_attack(dict(type='PGD', **SIZES), victim)(images, labels),
    'RoutePGD': lambda victim, images, labels: build_attack(dict(type='RoutePGD', **SIZES), victim)(images, labels),
    'dissection': lambda victim, images, labels: dissect(
        victim, Images(images, labels, 8), ThreatModel('Linf', **SIZES)
    ),
}


@pytest.mark.parametrize('path', PATHS)
def test_a_router_that_is_not_finite_is_named(path):
    for routing, name in (('image', 'router'), ('layer', r'layer\d.*conv\d'), ('token', r'layers\.1\.ffn')):
        victim = random_mixture(routing)
        images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
        router = router_modules(victim.model)[-1]
        with torch.no_grad():
            next(iter(router.parameters())).view(-1)[0] = float('nan')
        with pytest.raises(NonFiniteRouterError, match=f"the router '{name}' are not finite"):
            PATHS[path](victim, images, labels)
