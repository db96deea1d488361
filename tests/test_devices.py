"""Every forward pass, attack and loss on a GPU that is not there: a tensor made on the wrong device fails here."""

import pytest
import torch
from fake_gpu import fake_gpu, moved
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from small_mixtures import mixture_cfg
from tiny_models import CLASSES, dense_backbone, moe_backbone

from mmadvmoe.attacks import HeldVictim, Pathway, RoutePGD, Victim, build_attack
from mmadvmoe.moe import PLACEMENTS

IMAGES, TOKENS = 6, 6 * 5  # 2 x 2 patches and the class token


def mixture(routing):
    return Victim(moved(MODELS.build(mixture_cfg(routing)))).eval()


@pytest.fixture
def gpu():
    with fake_gpu(IMAGES, TOKENS) as device:
        yield device


def test_a_tensor_on_the_wrong_device_fails(gpu):
    with pytest.raises(RuntimeError, match='device'):
        torch.rand(3, device=gpu) + torch.rand(3)


@pytest.mark.parametrize('routing', PLACEMENTS)
def test_forward_passes(gpu, routing):
    victim = mixture(routing)
    images = torch.rand(IMAGES, 3, 8, 8, device=gpu)
    logits, routings = victim.forward_routed(images)
    forced = victim.forward_routed(images, torch.zeros(IMAGES, dtype=torch.long, device=gpu))[0]
    held = victim.forward_routed(images, routings)[0]
    decided = victim.decide_routes(images)
    assert {t.device.type for t in (logits, forced, held, *(r.expert for r in decided))} == {gpu}
    points = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(victim(points).sum(), points)
    assert grad.device.type == gpu


@pytest.mark.parametrize('top_k', [1, 2])
@pytest.mark.parametrize('settings', [dict(capacity_factor=0.5), dict(noise=1.0)])
def test_token_routers_in_training(gpu, settings, top_k):
    with fake_gpu(IMAGES, TOKENS * top_k):
        victim = mixture('token')
        for layer in victim.classifier.backbone.expert_layers():
            for name, value in dict(top_k=top_k, **settings).items():
                setattr(layer.router, name if name != 'noise' else 'noise_std', value)
        victim.train()
        assert victim(torch.rand(IMAGES, 3, 8, 8, device=gpu)).device.type == gpu


ATTACKS = [
    *((kind, 'Linf', routing) for kind in ('PGD', 'TRADESAttack', 'RoutePGD') for routing in (*PLACEMENTS, None)),
    *(('RouterAttack', 'Linf', routing) for routing in PLACEMENTS),
    *((kind, norm, None) for kind in ('PGD', 'RoutePGD') for norm in ('L2', 'L1')),
]


@pytest.mark.parametrize(('kind', 'norm', 'routing'), ATTACKS)
def test_own_attacks(gpu, kind, norm, routing):
    if routing is None:
        victim = Victim(classifier(dense_backbone())).eval()
    else:
        victim = mixture(routing)
    restarts = {} if kind == 'TRADESAttack' else dict(restarts=2)
    attack = build_attack(dict(type=kind, norm=norm, eps=0.5, steps=1, **restarts), victim)
    adversarial = attack(*batch(gpu))
    assert adversarial.device.type == gpu


@pytest.mark.parametrize('routing', PLACEMENTS)
@pytest.mark.parametrize('kind', ['PGD', 'FGSM'])
def test_held_routes_and_pathways(gpu, kind, routing):
    victim = mixture(routing)
    images, labels = batch(gpu)
    steps = dict(steps=1) if kind == 'PGD' else {}
    assert build_attack(dict(type=kind, route='held', **steps), victim)(images, labels).device.type == gpu
    assert build_attack(dict(type=kind, **steps), Pathway(victim, 1))(images, labels).device.type == gpu
    if routing != 'token':
        route = torch.zeros(victim.num_routers, dtype=torch.long, device=gpu)
        assert HeldVictim(victim, route)(images).device.type == gpu


def test_labels_may_lie_on_the_host(gpu):
    images, labels = batch(gpu)
    attack = build_attack(dict(type=RoutePGD, eps=0.1, steps=2), mixture('image'))
    assert attack(images, labels.cpu()).device.type == gpu


def batch(device):
    return torch.rand(IMAGES, 3, 8, 8, device=device), torch.arange(IMAGES, device=device) % 3


def classifier(backbone, **settings):
    model = MODELS.build(
        dict(
            type='RobustClassifier',
            backbone=backbone,
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=4),
            **settings,
        )
    )
    return moved(model)


LOSSES = [
    dict(type='TRADESLoss'),
    dict(type='AdversarialCrossEntropyLoss'),
    dict(type='MARTLoss'),
    dict(type='RouterLabelLoss'),
    dict(type='RouterKLLoss'),
    dict(type='RouterBalanceLoss'),
    dict(type='RouterLocalEntropyLoss'),
    dict(type='RouterGlobalEntropyLoss'),
    dict(type='RouterImportanceLoss'),
    dict(type='RouterZLoss'),
]


@pytest.mark.parametrize('turn', [None, 'experts', 'router'])
def test_losses_from_the_loader_on(gpu, turn):
    preprocessor = dict(attack=dict(type='TRADESAttack', steps=1), mean=[120.0] * 3, std=[60.0] * 3)
    model = classifier(
        moe_backbone(num_experts=3), robust_loss=LOSSES[:3], router_loss=LOSSES, data_preprocessor=preprocessor
    )
    data = from_loader()
    if turn:
        data['turn'] = turn
    batch = model.data_preprocessor(data, training=True)
    losses = model.loss(**batch)
    assert {value.device.type for value in losses.values()} == {gpu}
    model.parse_losses(losses)[0].backward()
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {gpu}


def from_loader():
    """A batch on the host, as MMPretrain's `default_collate` makes it."""
    samples = [DataSample(gt_label=torch.zeros(1, dtype=torch.long)) for _ in range(IMAGES)]
    return dict(inputs=torch.zeros(IMAGES, 3, 8, 8, dtype=torch.uint8), data_samples=samples)
