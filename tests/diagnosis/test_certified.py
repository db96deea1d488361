from dataclasses import asdict

import pytest
import torch
from mmpretrain.registry import MODELS
from small_mixtures import TinyPathway, random_mixture  # noqa: F401
from torch import nn

from mmadvmoe.attacks import Victim, build_attack
from mmadvmoe.diagnosis.dissection import certified_routes, dissect, summarize
from mmadvmoe.diagnosis.dissection_tables import dissection_tables
from mmadvmoe.diagnosis.subject import Images, ThreatModel

ROUTERS = [
    dict(type='MLPRouter', hidden=0),
    dict(type='MLPRouter', pool=2),
    dict(type='ConvRouter', channels=(4, 6)),
]


def mixture(router, num_experts=3, **preprocessor):
    """A mixture on images of 8x8 whose router sends them to different experts."""
    backbone = dict(
        type='MoEBackbone',
        num_experts=num_experts,
        include=['^conv$'],
        router=dict(router, image_size=8),
        backbone=dict(type='TinyPathway'),
    )
    head = dict(type='LinearClsHead', num_classes=2, in_channels=2)
    neck = dict(type='GlobalAveragePooling')
    model = dict(
        type='ImageClassifier', backbone=backbone, neck=neck, head=head, data_preprocessor=preprocessor or None
    )
    victim = Victim(MODELS.build(model)).eval()
    fc = victim.classifier.backbone.router.fc
    nn.init.normal_(fc.weight)
    with torch.no_grad():
        fc.bias -= victim.decide_routes(torch.rand(64, 3, 8, 8))[0].logits.mean(0)
    return victim


def data_of(count):
    return Images(torch.rand(count, 3, 8, 8), torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize('norm', ['Linf', 'L2', 'L1'])
@pytest.mark.parametrize('router', ROUTERS, ids=str)
def test_no_attack_changes_a_certified_route(router, norm):
    scaled = dict(type='ClsDataPreprocessor', mean=[100.0, 90.0, 80.0], std=[50.0, 60.0, 70.0])
    victim, data = mixture(router, **scaled), data_of(80)
    eps = dict(Linf=0.015, L2=0.1, L1=0.2)[norm]
    threat = ThreatModel(norm, eps, eps / 4, 12)
    certified = certified_routes(victim, data, threat)
    clean = victim.decide_routes(data.images)[0].expert
    attack = build_attack(threat.attack('RouterAttack'), victim)
    changed = victim.decide_routes(attack(data.images))[0].expert != clean
    assert not (certified & changed).any()
    # The weak router has both: or the above says nothing.
    assert 0.05 < certified.float().mean() < 1 and changed.any()
    smaller = certified_routes(victim, data, ThreatModel(norm, eps / 10, eps / 40, 12))
    assert smaller.sum() > certified.sum() and (smaller | ~certified).all()


def test_bounds_of_a_linear_router_are_exact():
    """With two experts one step reaches the worst corner of the ball."""
    victim, data = mixture(dict(type='MLPRouter', hidden=0), num_experts=2), data_of(200)
    threat = ThreatModel('Linf', 0.05, 0.05, 1)
    attack = build_attack(threat.attack('RouterAttack', random_start=False), victim)
    clean, moved = (victim.decide_routes(images)[0].expert for images in (data.images, attack(data.images)))
    assert (certified_routes(victim, data, threat) == (clean == moved)).all()
    assert 0 < (clean == moved).float().mean() < 1


def test_one_hidden_layer_is_bounded_tighter_than_by_intervals():
    victim, data, eps = mixture(dict(type='MLPRouter', hidden=16)), data_of(200), 0.02
    hidden, fc = victim.classifier.backbone.router.hidden, victim.classifier.backbone.router.fc
    x = data.images.flatten(1) * 255
    middle, spread = hidden(x), 255 * eps * hidden.weight.abs().sum(1)
    low, high = (middle - spread).relu(), (middle + spread).relu()
    chosen = fc(middle.relu()).argmax(1)
    difference = fc.weight[chosen][:, None] - fc.weight
    bound = (difference.clamp(min=0) * low[:, None] + difference.clamp(max=0) * high[:, None]).sum(2)
    bound = bound + fc.bias[chosen][:, None] - fc.bias
    by_intervals = bound.scatter(1, chosen[:, None], torch.inf).amin(1) > 0
    certified = certified_routes(victim, data, ThreatModel('Linf', eps, eps, 1))
    assert (certified | ~by_intervals).float().mean() > 0.95 and certified.sum() > 1.1 * by_intervals.sum()


def test_dissection_has_them_beside_the_attacked_share():
    threat = ThreatModel('Linf', 0.02, 0.005, 8)
    found = summarize(dissect(mixture(dict(type='MLPRouter')), data_of(40), threat))
    certified, changed = found['routes_certified'], found['attacks']['router']['route_changed']
    assert 0 < certified <= 1 - changed
    header = dict(config='my.py', num_images=40, routing='image', num_experts=3, routers=['router'], class_names='ab')
    tables = dissection_tables(dict(found, **header, threat_model=asdict(threat)))
    assert f'{certified:.1%} of the images provably keep theirs' in tables and f'{changed:.1%} lose it' in tables


@pytest.mark.parametrize('routing', ['image', 'layer'])
def test_other_routers_have_no_certificate(routing):
    victim, data = random_mixture(routing), data_of(4)
    assert certified_routes(victim, data, ThreatModel('Linf', 0.02, 0.005, 2)) is None
