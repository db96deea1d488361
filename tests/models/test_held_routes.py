"""Experts that learn with the route held, and a router that learns groups of classes."""

import pytest
import torch
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from mmadvmoe.attacks import Victim, build_attack, kl_divergence
from mmadvmoe.attacks.views import clean_route
from mmadvmoe.moe import split_parameters

GROUPS = [[0, 2], [1, 3]]
ATTACK = dict(type='TRADESAttack', eps=0.1, alpha=0.05, steps=2, router_weight=0.0, route='held')
PREPROCESSOR = dict(
    type='AdvDataPreprocessor',
    attack=ATTACK,
    router_attack=dict(type='ClassGroupAttack', groups=GROUPS, eps=0.1, alpha=0.05, steps=3),
)


def build(routing='image', **cfg):
    torch.manual_seed(0)
    router = dict(type='MLPRouter', image_size=8) if routing == 'image' else dict(type='LayerRouter')
    model = dict(
        type='RobustClassifier',
        route='held',
        data_preprocessor=PREPROCESSOR,
        backbone=dict(
            type='MoEBackbone',
            num_experts=2,
            include=[r'convs\.\d\.conv'],
            share_stem=False,
            routing=routing,
            router=router,
            backbone=dict(type='PlainConvNet', widths=(4, 4), strides=(2, 1)),
        ),
        head=dict(type='LinearClsHead', num_classes=4, in_channels=64, loss=dict(type='CrossEntropyLoss')),
        router_loss=dict(type='ClassGroupLoss', groups=GROUPS),
    )
    model.update(cfg)
    return MODELS.build(model)


def batch(turn):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (12, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[1::2] //= 4  # the second group is darker
    samples = [DataSample().set_gt_label(i % 4) for i in range(12)]
    return dict(inputs=list(images), data_samples=samples, turn=turn)


@pytest.mark.parametrize('routing', ['image', 'layer'])
def test_experts_learn_on_the_pathway_of_the_clean_image(routing):
    model = build(routing)
    data = model.data_preprocessor(batch('experts'), training=True)
    losses = model.loss(**data)
    clean, adversarial = data['inputs'], data['adv_inputs']
    route = clean_route(Victim(model), model.data_preprocessor.to_unit(clean))
    features = model.backbone.forward_routed(adversarial, route)[0]
    expected = 6 * kl_divergence(model(clean), model.head(features)).mean()
    torch.testing.assert_close(losses['loss_robust'], expected)
    gradients = torch.autograd.grad(
        sum(losses.values()), [p for _, p in split_parameters(model)['router']], allow_unused=True
    )
    assert all(gradient is None for gradient in gradients)
    record = model.routing_records['experts']
    assert torch.equal(torch.cat([r.decisions for r in record.adversarial], 1), route)


def test_free_experts_learn_where_an_attack_sends_images():
    attack = dict(type='RoutePGD', eps=0.3, alpha=0.1, steps=4)
    model = build(route='free', data_preprocessor=dict(type='AdvDataPreprocessor', attack=attack))
    with torch.no_grad():
        router = model.backbone.router
        router.fc.weight.mul_(100)
        router.fc.bias -= router(torch.rand(64, 3, 8, 8)).mean(0)
    data = model.data_preprocessor(batch('experts'), training=True)
    losses = model.loss(**data)
    victim = Victim(model)
    clean, adversarial = (
        clean_route(victim, model.data_preprocessor.to_unit(data[k])) for k in ('inputs', 'adv_inputs')
    )
    record = model.routing_records['experts']
    assert torch.equal(torch.cat([r.decisions for r in record.adversarial], 1), adversarial)
    assert not torch.equal(clean, adversarial)
    features = model.backbone.forward_routed(data['adv_inputs'], adversarial)[0]
    expected = 6 * kl_divergence(model(data['inputs']), model.head(features)).mean()
    torch.testing.assert_close(losses['loss_robust'], expected)
    psi = [p for _, p in split_parameters(model)['router']]
    assert all(g is None for g in torch.autograd.grad(sum(losses.values()), psi, allow_unused=True))


def test_the_attack_is_against_the_pathway_of_the_clean_image():
    victim = Victim(build().eval())
    images = torch.rand(16, 3, 8, 8)
    with torch.no_grad():
        clean, route = victim(images), clean_route(victim, images)
        # So small a router holds: it has to be pushed for the two attacks to differ.
        for parameter in victim.classifier.backbone.router.parameters():
            parameter.mul_(100)
        divergence = {}
        for name in ('held', 'gate'):
            with torch.enable_grad():
                attack = build_attack(dict(ATTACK, route=name, gated=name == 'gate', steps=8), victim)
            points = attack(images, seed=0)
            divergence[name] = kl_divergence(clean, victim.forward_routed(points, route)[0])
    assert divergence['held'].mean() > divergence['gate'].mean() > 0


def test_the_router_learns_its_groups_under_attack():
    model = build()
    optimizer = torch.optim.SGD([p for _, p in split_parameters(model)['router']], lr=0.1)
    first = None
    for _ in range(60):
        data = model.data_preprocessor(batch('router'), training=True)
        (loss,) = model.loss(**data).values()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.6 * first


@pytest.mark.parametrize('routing', ['image', 'layer'])
def test_the_attack_on_groups_raises_their_cross_entropy(routing):
    model = build(routing, data_preprocessor=dict(attack=ATTACK)).eval()
    victim, images, labels = Victim(model), torch.rand(12, 3, 8, 8), torch.arange(12) % 4
    attack = build_attack(dict(type='ClassGroupAttack', groups=GROUPS, eps=0.1, alpha=0.03, steps=8), victim)
    adversarial = attack(images, labels, seed=0)
    assert (adversarial - images).abs().max() <= 0.1 + 1e-6
    groups = attack.attack.groups
    with torch.no_grad():
        before, after = (groups.cross_entropy(victim.decide_routes(x), labels) for x in (images, adversarial))
    assert (after > before).float().mean() > 0.9
    soft = torch.nn.functional.one_hot(labels, 4).float()
    assert torch.equal(attack(images, soft, seed=0), adversarial)


@pytest.mark.parametrize(
    ('cfg', 'error'),
    [
        (dict(route='hold'), "model.route='hold'.*did you mean 'held'"),
        (dict(router_loss=dict(type='ClassGroupLoss', groups=[[0, 1, 2, 3]])), '1 groups do not fit'),
        (dict(router_loss=dict(type='ClassGroupLoss', groups=[[0], [1]])), 'groups holds 2 classes'),
        (
            dict(data_preprocessor=dict(attack=ATTACK, router_attack=dict(type='ClassGroupAttack', groups=[[0], [1]]))),
            'groups holds 2 classes',
        ),
        (
            dict(data_preprocessor=PREPROCESSOR | dict(attack=dict(ATTACK, route='gate'))),
            r"model\.route='held', but data_preprocessor\.attack\.route='gate'",
        ),
        (
            dict(router_loss=dict(type='ClassGroupLoss', groups=[[0, 1], [2, 3]])),
            r'data_preprocessor\.router_attack\.groups=.* are not the groups of model\.router_loss.*\[0, 0, 1, 1\]',
        ),
    ],
)
def test_mistakes_are_named_when_the_model_is_built(cfg, error):
    with pytest.raises(ValueError, match=error):
        build(**cfg)


def test_what_agrees_may_be_written_in_two_ways():
    attack = dict(PREPROCESSOR['router_attack'], groups='modulo')
    build(data_preprocessor=dict(PREPROCESSOR, router_attack=attack))
    # In joint training one attack is on routes and pathways.
    both = dict(ATTACK, route='gate')
    for router_attack in (None, both):
        build(data_preprocessor=dict(attack=both, router_attack=router_attack), router_loss=None)
